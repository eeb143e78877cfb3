"""A slice of Cloud TPUs through `gcloud`: argument lists only, errors in one line, what passes by
itself is tried again.
"""

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
from complaints import FINAL, MISSING, REFUSED, UNDERWAY, code_of, complaint, last_line, passes
from rehearsal import Rehearsal

ATTEMPTS = 6  # of a command that may work the next time
ENDED = ("SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "STOPPED")  # never comes back by itself
# seconds that one command of gcloud may take, with its repetitions: setting up, copying a run
SLOWEST = 3600.0
FOLLOWED = 10 * 24 * 3600.0  # a log
HASTE = 600.0  # and when the paid hours are over
HALF = 900.0  # seconds that a slice may be called active without a machine


@dataclass
class Slice:
    """One queued resource with one node of the same name, and the hours that it is paid for.

    `sleep` and `clock` are arguments so that tests need not wait.
    """

    name: str
    zone: str
    project: str = ""
    rehearsal: Rehearsal | None = None  # answers in the place of gcloud: a dry run
    type: str = ""  # that it must have; nothing = any
    max_hours: float = 0.0  # 0 = not watched
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time
    paid: float = 0.0  # seconds, of the machines that are gone
    since: float | None = None  # when the machine that is there began to cost
    reason: str = ""  # why it is FAILED
    packed: bool = (
        False  # the code, once: a slice that is made anew goes on with what the run began with
    )
    ready: bool = False  # set up, by us, since it was made
    ours: bool = False  # made or seen active by this call, and not deleted by it
    lived: bool = False  # this call has seen it active, or one before it
    slowest: float = SLOWEST

    # --- gcloud ---

    def say(self, text: str) -> None:
        """To the person who watches. A dry run prints a script: there it is a comment."""
        print(f"# {text}" if self.rehearsal else text, flush=True)

    def gcloud(
        self, *words: str, patient: bool = True, show: bool = False
    ) -> subprocess.CompletedProcess:
        """Run it; what may pass by itself is tried again, with growing pauses, when `patient`. The
        caller looks at the code.
        """
        argv = ["gcloud", *words, "--quiet"]
        if self.rehearsal:
            print(shlex.join(argv), flush=True)
            return self.rehearsal.answer(argv)
        end = self.clock() + self.slowest
        for number in range(ATTEMPTS):
            try:
                done = subprocess.run(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=None if show else subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    timeout=self.longest(end),
                )
            except subprocess.TimeoutExpired as error:
                self.pause(0.0)  # the paid hours may be over
                done = subprocess.CompletedProcess(
                    argv, 1, "", f"gcloud timed out after {error.timeout:.0f} s"
                )
            except FileNotFoundError:
                text = "gcloud is missing; install it: https://cloud.google.com/sdk/docs/install"
                raise Stop(text, code=1 if self.ours else 2) from None
            late = number == ATTEMPTS - 1 or self.clock() + backoff(number) >= end
            if done.returncode == 0 or not patient or late or not passes(done.stderr):
                break
            print(
                f"gcloud: {last_line(done.stderr)}; again in {backoff(number):.0f} s",
                file=sys.stderr,
            )
            self.pause(backoff(number))
        return done

    def tpu(self, group: str, verb: str, *words: str, **how) -> subprocess.CompletedProcess:
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return self.gcloud("compute", "tpus", group, verb, *words, *where, **how)

    def ssh(self, command: str, *, worker: str = "all", **how) -> subprocess.CompletedProcess:
        """A command on one host or on all. gcloud holds back what many hosts say until all have
        ended: keep it short.
        """
        alive = "--ssh-flag=-o ServerAliveInterval=30"
        return self.tpu(
            "tpu-vm", "ssh", self.name, f"--worker={worker}", alive, f"--command={command}", **how
        )

    def copy(self, *words: str, worker: str = "all", **how) -> subprocess.CompletedProcess:
        return self.tpu("tpu-vm", "scp", f"--worker={worker}", *words, **how)

    # --- time and money ---

    def longest(self, end: float) -> float:
        """Seconds that a command may take: until `end` by the clock, or until the paid ones are
        over.
        """
        left = end - self.clock()
        if self.since is not None and self.max_hours:
            left = min(left, self.max_hours * 3600 - self.seconds())
        return max(left, 1.0)

    def hasten(self) -> None:
        """Nothing is left but to stop, to copy and to delete: the guard does not count any more,
        and no command takes long.
        """
        self.max_hours, self.slowest = 0.0, HASTE

    def pause(self, seconds: float) -> None:
        """Sleep, but not beyond the last paid second. Raises TimeUp."""
        if self.rehearsal:
            return
        if self.since is None or not self.max_hours:
            return self.sleep(seconds)
        left = self.max_hours * 3600 - self.seconds()
        if left > 0:
            self.sleep(min(seconds, left))
        if left <= seconds:
            raise TimeUp

    def seconds(self) -> float:
        """Paid until now."""
        return self.paid + (self.clock() - self.since if self.since is not None else 0.0)

    # --- its life ---

    def state(self) -> str:
        """NONE; one of ENDED; ACTIVE when its machine is ready; anything else is on the way. Raises
        Stop.
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
                f"{self.name} is there as {', '.join(types)}, not {self.type}; delete it, or choose another name"
            )
        about = resource.get("state", {})
        found = about.get("state", "UNKNOWN")
        if found != "ACTIVE":
            self.reason = (
                about.get("failedData", {}).get("error", {}).get("message", "")
                if found == "FAILED"
                else ""
            )
            return found
        node = self._describe("tpu-vm")
        if (
            node is None or node.get("state") == "DELETING"
        ):  # preempted or deleted: its resource will say which
            return "MISSING"
        if node.get("state") != "READY":
            return node.get("state", "UNKNOWN")
        if self.since is None:
            self.since = min(self.clock(), begun(node) or self.clock())
        self.ours = self.lived = True
        return "ACTIVE"

    def _describe(self, group: str) -> dict | None:
        done = self.tpu(group, "describe", self.name, "--format=json")
        if done.returncode:
            if MISSING.search(done.stderr):
                return None
            code = (
                1 if self.ours else code_of(done.stderr, quota=True)
            )  # what costs is not left alone
            raise Stop(f"cannot look at {self.name} in {self.zone}: {complaint(done.stderr)}", code)
        try:
            return dict(json.loads(done.stdout))
        except (ValueError, TypeError):
            raise Stop(
                f"cannot look at {self.name}: gcloud's answer is no JSON: {done.stdout[:60]!r}",
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
        """Ask for it. One that is there already is taken as it is. Raises Stop."""
        words = [
            f"--node-id={self.name}",
            f"--accelerator-type={kind.type}",
            f"--runtime-version={kind.image}",
        ]
        words += ["--spot"] if spot else []
        words += [f"--valid-until-duration={wait_hours * 3600:.0f}s"] if wait_hours else []
        done = self.tpu("queued-resources", "create", self.name, *words, *extra)
        if done.returncode == 0 or UNDERWAY.search(done.stderr):
            self.ours = True
            return
        if "ALREADY_EXISTS" not in done.stderr:
            hint = (
                "; ask for more quota, or take another type or zone"
                if "quota" in done.stderr.lower()
                else ""
            )
            code = code_of(done.stderr, quota=self.lived)
            raise Stop(
                f"cannot create {self.name} ({kind.type}): {complaint(done.stderr)}{hint}", code
            )
        self.say(f"{self.name} is there already: {self.look()}")

    def delete(self) -> bool:
        """Delete it, and its machine, whatever its state, for as long as it takes: whether there
        was one.

        What this call has made it goes on deleting through anything but a final refusal. Raises
        Stop when it may still be there (and cost), and TimeUp.
        """
        number, there = 0, False
        while (
            done := self.tpu("queued-resources", "delete", self.name, "--force", patient=False)
        ).returncode:
            said = done.stderr
            if MISSING.search(said):
                break
            refused = bool(REFUSED.search(said) or UNDERWAY.search(said))
            there = there or refused
            if not (refused or passes(said) or (self.ours and not FINAL.search(said))):
                raise Stop(
                    f"{self.name} could not be deleted and may still cost: {complaint(said)}; {self.how_to_delete()}",
                    1,
                )
            print(
                f"{self.name} is not deleted yet: {complaint(said)}; again in {backoff(number):.0f} s",
                file=sys.stderr,
            )
            self.pause(backoff(number))
            number += 1
        there = there or done.returncode == 0
        self.ready = self.ours = False
        self.paid, self.since = self.seconds(), None
        return there

    def look(self) -> str:
        """`state`, through an outage of any length; what is ours through all that keeps us from
        looking. Raises Stop, TimeUp.
        """
        while True:
            try:
                return self.state()
            except Stop as stop:
                if stop.code != 1:
                    raise
                print(f"{stop}; looking again", file=sys.stderr)
                self.pause(LONGEST)

    def wait(self) -> str:
        """Until it is ACTIVE, NONE or has ended: which of them. Waiting in the queue costs
        nothing.
        """
        before, number, missing = "", 0, 0.0
        while (found := self.look()) not in ("ACTIVE", "NONE", *ENDED):
            if found != before:
                self.say(f"{self.name}: {found}")
            missing = missing + backoff(number) if found == "MISSING" else 0.0
            if missing > HALF:
                found, self.reason = "FAILED", "it has no machine"
                break
            self.pause(backoff(number))
            before, number = found, number + 1
        self.say(
            f"{self.name}: {found}{f' ({self.reason})' if found == 'FAILED' and self.reason else ''}"
        )
        return found

    @property
    def place(self) -> str:
        return f"--zone {self.zone}" + (f" --project {self.project}" if self.project else "")

    def may_cost(self) -> str:
        return f"if {self.name} is still there it costs: {self.how_to_delete()}"

    def how_to_delete(self) -> str:
        return f"delete it with: python3 tpu/tpu.py delete {self.name} {self.place}"


def begun(node: dict) -> float | None:
    """When a machine was made, in seconds of the clock."""
    try:
        return datetime.fromisoformat(re.sub(r"\.\d+", "", node.get("createTime", ""))).timestamp()
    except ValueError:
        return None
