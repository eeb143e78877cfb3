"""A slice of Cloud TPUs, controlled through `gcloud`. Transient errors are retried."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from accelerators import Accelerator
from basics import LONGEST, Stop, TimeUp, backoff
from gcloud_errors import (
    FINAL,
    MISSING,
    REFUSED,
    STILL_RUNNING,
    describe_error,
    exit_code_of,
    is_transient,
    last_line,
)
from rehearsal import Rehearsal

ATTEMPTS = 6  # for a command with transient errors
ENDED = (
    "SUSPENDED",
    "FAILED",
    "PREEMPTED",
    "TERMINATED",
    "STOPPED",
)  # states that never become active again
# Seconds that a gcloud command may take with its retries: the longest set up hosts, or copy a run.
COMMAND_TIMEOUT = 3600.0
LOG_TIMEOUT = 10 * 24 * 3600.0  # the same, for following a log
FINAL_TIMEOUT = 600.0  # the same, when the paid hours are over
MISSING_LIMIT = 900.0  # seconds that a slice may be ACTIVE without a machine


@dataclass
class Slice:
    """A queued resource with one node of the same name, and its paid hours.

    Tests replace `sleep` and `clock`.
    """

    name: str
    zone: str
    project: str = ""
    rehearsal: Rehearsal | None = None  # answers in place of gcloud in a dry run
    type: str = ""  # the required type; empty = any
    max_hours: float = 0.0  # limit of paid hours; 0 = none
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time
    paid: float = 0.0  # seconds, for earlier machines
    since: float | None = None  # when the present machine began to cost
    reason: str = ""  # why it is FAILED
    packed: bool = False  # the code is packed only once: a new slice runs the same code
    ready: bool = False  # this call has set up its present machine
    ours: bool = False  # this call has created it or seen it active, and not deleted it
    was_active: bool = False  # this call has seen it, or one before it, active
    command_timeout: float = COMMAND_TIMEOUT

    # --- gcloud ---

    def say(self, text: str) -> None:
        """Print a message, in a dry run as a comment of the printed script."""
        print(f"# {text}" if self.rehearsal else text, flush=True)

    def gcloud(
        self, *words: str, patient: bool = True, show: bool = False
    ) -> subprocess.CompletedProcess:
        """Run a gcloud command; the caller checks the exit code.

        If `patient`, transient errors are retried with growing pauses.
        """
        argv = ["gcloud", *words, "--quiet"]
        if self.rehearsal:
            print(shlex.join(argv), flush=True)
            return self.rehearsal.answer(argv)
        end = self.clock() + self.command_timeout
        for number in range(ATTEMPTS):
            try:
                done = subprocess.run(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=None if show else subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    timeout=self.time_left(end),
                )
            except subprocess.TimeoutExpired as error:
                self.pause(0.0)  # raises TimeUp if the paid hours are over
                done = subprocess.CompletedProcess(
                    argv, 1, "", f"gcloud timed out after {error.timeout:.0f} s"
                )
            except FileNotFoundError:
                text = "gcloud is missing; install it: https://cloud.google.com/sdk/docs/install"
                raise Stop(text, code=1 if self.ours else 2) from None
            late = number == ATTEMPTS - 1 or self.clock() + backoff(number) >= end
            if done.returncode == 0 or not patient or late or not is_transient(done.stderr):
                break
            print(
                f"gcloud: {last_line(done.stderr)}; trying again in {backoff(number):.0f} s",
                file=sys.stderr,
            )
            self.pause(backoff(number))
        return done

    def tpu(self, group: str, verb: str, *words: str, **how) -> subprocess.CompletedProcess:
        """Run a command of `gcloud compute tpus`."""
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return self.gcloud("compute", "tpus", group, verb, *words, *where, **how)

    def ssh(self, command: str, *, worker: str = "all", **how) -> subprocess.CompletedProcess:
        """Run a command on one host or on all.

        With several hosts gcloud prints nothing before all have finished: use short commands.
        """
        alive = "--ssh-flag=-o ServerAliveInterval=30"
        return self.tpu(
            "tpu-vm", "ssh", self.name, f"--worker={worker}", alive, f"--command={command}", **how
        )

    def copy(self, *words: str, worker: str = "all", **how) -> subprocess.CompletedProcess:
        """Copy files to or from the hosts."""
        return self.tpu("tpu-vm", "scp", f"--worker={worker}", *words, **how)

    # --- Time and money ---

    def time_left(self, end: float) -> float:
        """Return the seconds until the time `end`, or until the paid hours are over."""
        left = end - self.clock()
        if self.since is not None and self.max_hours:
            left = min(left, self.max_hours * 3600 - self.paid_seconds())
        return max(left, 1.0)

    def end_guard(self) -> None:
        """End the limit of paid hours: what is left is to stop, copy and delete, quickly."""
        self.max_hours, self.command_timeout = 0.0, FINAL_TIMEOUT

    def pause(self, seconds: float) -> None:
        """Sleep, at most until the paid hours are over. Raises TimeUp."""
        if self.rehearsal:
            return
        if self.since is None or not self.max_hours:
            return self.sleep(seconds)
        left = self.max_hours * 3600 - self.paid_seconds()
        if left > 0:
            self.sleep(min(seconds, left))
        if left <= seconds:
            raise TimeUp

    def paid_seconds(self) -> float:
        """Return the seconds paid so far."""
        return self.paid + (self.clock() - self.since if self.since is not None else 0.0)

    # --- Create, wait, delete ---

    def state(self) -> str:
        """Return NONE, one of ENDED, ACTIVE if its machine is ready, or another state on the way.

        Raises Stop.
        """
        resource = self._describe("queued-resources")
        if resource is None:
            return "NONE"
        nodes = resource.get("tpu", {}).get("nodeSpec", [])
        types = {
            node["node"]["acceleratorType"]
            for node in nodes
            if "acceleratorType" in node.get("node", {})
        }
        if self.type and types - {self.type}:
            raise Stop(
                f"{self.name} exists as {', '.join(types)}, not {self.type}; "
                "delete it, or choose another name"
            )
        about = resource.get("state", {})
        found = about.get("state", "UNKNOWN")
        if found != "ACTIVE":
            error = about.get("failedData", {}).get("error", {}) if found == "FAILED" else {}
            self.reason = error.get("message", "")
            return found
        node = self._describe("tpu-vm")
        if node is None or node.get("state") == "DELETING":
            return "MISSING"  # preempted or deleted: the resource's state will say which
        if node.get("state") != "READY":
            return node.get("state", "UNKNOWN")
        if self.since is None:
            self.since = min(self.clock(), created_at(node) or self.clock())
        self.ours = self.was_active = True
        return "ACTIVE"

    def _describe(self, group: str) -> dict | None:
        done = self.tpu(group, "describe", self.name, "--format=json")
        if done.returncode:
            if MISSING.search(done.stderr):
                return None
            # With 1 the caller tries again: a slice that costs is not left alone.
            code = 1 if self.ours else exit_code_of(done.stderr, quota=True)
            why = describe_error(done.stderr)
            raise Stop(f"cannot describe {self.name} in {self.zone}: {why}", code)
        try:
            return dict(json.loads(done.stdout))
        except (ValueError, TypeError):
            raise Stop(
                f"cannot describe {self.name}: gcloud's answer is not JSON: {done.stdout[:60]!r}",
                code=1,
            ) from None

    def create(
        self,
        kind: Accelerator,
        *,
        spot: bool = False,
        wait_hours: float = 0,
        extra: tuple[str, ...] = (),
    ) -> None:
        """Request the slice; an existing one is used. Raises Stop."""
        words = [
            f"--node-id={self.name}",
            f"--accelerator-type={kind.type}",
            f"--runtime-version={kind.image}",
        ]
        words += ["--spot"] if spot else []
        words += [f"--valid-until-duration={wait_hours * 3600:.0f}s"] if wait_hours else []
        done = self.tpu("queued-resources", "create", self.name, *words, *extra)
        if done.returncode == 0 or STILL_RUNNING.search(done.stderr):
            self.ours = True
            return
        if "ALREADY_EXISTS" not in done.stderr:
            why = describe_error(done.stderr)
            if "quota" in done.stderr.lower():
                why += "; ask for more quota, or use another type or zone"
            code = exit_code_of(done.stderr, quota=self.was_active)
            raise Stop(f"cannot create {self.name} ({kind.type}): {why}", code)
        self.say(f"{self.name} exists already: {self.poll()}")

    def delete(self) -> bool:
        """Delete the slice and its machine in any state; return whether it existed.

        It tries until the slice is gone. If this call has created the slice, only a permanent
        error ends it. Raises Stop if the slice may still exist (and cost), and TimeUp.
        """
        number, there = 0, False
        while (
            done := self.tpu("queued-resources", "delete", self.name, "--force", patient=False)
        ).returncode:
            said = done.stderr
            if MISSING.search(said):
                break
            refused = bool(REFUSED.search(said) or STILL_RUNNING.search(said))
            there = there or refused
            if not (refused or is_transient(said) or (self.ours and not FINAL.search(said))):
                raise Stop(
                    f"{self.name} could not be deleted and may still cost: "
                    f"{describe_error(said)}; {self.how_to_delete()}",
                    code=1,
                )
            print(
                f"{self.name} is not deleted yet: {describe_error(said)}; "
                f"trying again in {backoff(number):.0f} s",
                file=sys.stderr,
            )
            self.pause(backoff(number))
            number += 1
        there = there or done.returncode == 0
        self.ready = self.ours = False
        self.paid, self.since = self.paid_seconds(), None
        return there

    def poll(self) -> str:
        """Return `state`, and wait through outages of any length. Raises Stop, TimeUp."""
        while True:
            try:
                return self.state()
            except Stop as stop:
                if stop.code != 1:
                    raise
                print(f"{stop}; trying again", file=sys.stderr)
                self.pause(LONGEST)

    def wait(self) -> str:
        """Wait until the state is ACTIVE, NONE or one of ENDED, and return it.

        Waiting in the queue costs nothing.
        """
        before, number, missing = "", 0, 0.0
        while (found := self.poll()) not in ("ACTIVE", "NONE", *ENDED):
            if found != before:
                self.say(f"{self.name}: {found}")
            missing = missing + backoff(number) if found == "MISSING" else 0.0
            if missing > MISSING_LIMIT:
                found, self.reason = "FAILED", "it has no machine"
                break
            self.pause(backoff(number))
            before, number = found, number + 1
        why = f" ({self.reason})" if found == "FAILED" and self.reason else ""
        self.say(f"{self.name}: {found}{why}")
        return found

    @property
    def location(self) -> str:
        return f"--zone {self.zone}" + (f" --project {self.project}" if self.project else "")

    def may_cost(self) -> str:
        return f"if {self.name} still exists it costs: {self.how_to_delete()}"

    def how_to_delete(self) -> str:
        return f"delete it with: python3 tpu/tpu.py delete {self.name} {self.location}"


def created_at(node: dict) -> float | None:
    """Return when a machine was created, in seconds of the clock, or None."""
    try:
        return datetime.fromisoformat(re.sub(r"\.\d+", "", node.get("createTime", ""))).timestamp()
    except ValueError:
        return None
