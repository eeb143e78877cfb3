"""A slice of Cloud TPUs through `gcloud`: argument lists only, errors in one line, what passes by itself is tried again."""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from accelerators import Accelerator
from basics import LONGEST, Stop, TimeUp, backoff, last_line, pack, private
from rehearsal import Rehearsal

ARCHIVE = "jaxppo.tar.gz"
ATTEMPTS = 6  # of a command that may work the next time
ENDED = ("SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "STOPPED")  # never comes back by itself
SLOWEST = 3600.0  # seconds that one command of gcloud may take: setting up, copying a run
HALF = 900.0  # seconds that a slice may be called active without a machine
MISSING = re.compile("NOT_FOUND|was not found|could not be found")
PASSING = re.compile(
    r"UNAVAILABLE|INTERNAL\b|ABORTED|DEADLINE_EXCEEDED|\b50[0234]\b|timed? ?out|Connection (reset|refused|closed)|"
    r"RESOURCE_EXHAUSTED|quota|Network is unreachable|Temporary failure in name resolution|\[255\]",
    re.IGNORECASE,
)


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
    packed: bool = False  # the code, once: a slice that is made anew goes on with what the run began with
    ready: bool = False  # set up, by us, since it was made

    # --- gcloud ---

    def say(self, text: str) -> None:
        """To the person who watches. A dry run prints a script: there it is a comment."""
        print(f"# {text}" if self.rehearsal else text, flush=True)

    def gcloud(self, *words: str, patient: bool = True, show: bool = False) -> subprocess.CompletedProcess:
        """Run it; what may pass by itself is tried again, with growing pauses, when `patient`. The caller looks at the code."""
        argv = ["gcloud", *words, "--quiet"]
        if self.rehearsal:
            print(shlex.join(argv), flush=True)
            return self.rehearsal.answer(argv)
        for number in range(ATTEMPTS):
            try:
                done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=None if show else subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True, errors="replace", timeout=self.longest())  # fmt: skip
            except subprocess.TimeoutExpired as error:
                self.pause(0.0)  # the paid hours may be over
                done = subprocess.CompletedProcess(argv, 1, "", f"gcloud timed out after {error.timeout:.0f} s")
            except FileNotFoundError:
                raise Stop("gcloud is missing; install it: https://cloud.google.com/sdk/docs/install") from None
            if done.returncode == 0 or not patient or number == ATTEMPTS - 1 or not PASSING.search(done.stderr):
                break
            print(f"gcloud: {last_line(done.stderr)}; again in {backoff(number):.0f} s", file=sys.stderr)
            self.pause(backoff(number))
        return done

    def tpu(self, group: str, verb: str, *words: str, **how) -> subprocess.CompletedProcess:
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return self.gcloud("compute", "tpus", group, verb, *words, *where, **how)

    def ssh(self, command: str, *, worker: str = "all", **how) -> subprocess.CompletedProcess:
        """A command on one host or on all. gcloud holds back what many hosts say until all have ended: keep it short."""
        alive = "--ssh-flag=-o ServerAliveInterval=30"
        return self.tpu("tpu-vm", "ssh", self.name, f"--worker={worker}", alive, f"--command={command}", **how)

    def copy(self, *words: str, worker: str = "all", **how) -> subprocess.CompletedProcess:
        return self.tpu("tpu-vm", "scp", f"--worker={worker}", *words, **how)

    # --- time and money ---

    def longest(self) -> float:
        """Seconds that one command may take: an hour, or what is left of the paid ones."""
        if self.since is None or not self.max_hours:
            return SLOWEST
        return min(SLOWEST, max(self.max_hours * 3600 - self.seconds(), 1.0))

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
        """NONE; one of ENDED; ACTIVE when its machine is ready; anything else is on the way. Raises Stop."""
        resource = self._describe("queued-resources")
        if resource is None:
            return "NONE"
        nodes = resource.get("tpu", {}).get("nodeSpec", [])
        types = {node["node"]["acceleratorType"] for node in nodes if "acceleratorType" in node.get("node", {})}
        if self.type and types - {self.type}:
            raise Stop(f"{self.name} is there as {', '.join(types)}, not {self.type}; delete it, or choose another name")
        about = resource.get("state", {})
        found = about.get("state", "UNKNOWN")
        if found != "ACTIVE":
            self.reason = about.get("failedData", {}).get("error", {}).get("message", "") if found == "FAILED" else ""
            return found
        node = self._describe("tpu-vm")
        if node is None:
            return "MISSING"
        if node.get("state") != "READY":
            return node.get("state", "UNKNOWN")
        if self.since is None:
            self.since = min(self.clock(), begun(node) or self.clock())
        return "ACTIVE"

    def _describe(self, group: str) -> dict | None:
        done = self.tpu(group, "describe", self.name, "--format=json")
        if done.returncode:
            if MISSING.search(done.stderr):
                return None
            raise Stop(f"cannot look at {self.name} in {self.zone}: {last_line(done.stderr)}", code=code_of(done.stderr))
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            raise Stop(f"cannot look at {self.name}: gcloud's answer is no JSON: {done.stdout[:60]!r}", code=1) from None

    def create(self, kind: Accelerator, *, spot: bool = False, wait_hours: float = 0, extra: tuple[str, ...] = ()) -> None:
        """Ask for it. One that is there already is taken as it is. Raises Stop."""
        words = [f"--node-id={self.name}", f"--accelerator-type={kind.type}", f"--runtime-version={kind.image}"]
        words += ["--spot"] if spot else []
        words += [f"--valid-until-duration={wait_hours * 3600:.0f}s"] if wait_hours else []
        done = self.tpu("queued-resources", "create", self.name, *words, *extra)
        if done.returncode == 0:
            return
        if "ALREADY_EXISTS" not in done.stderr:
            hint = "; ask for more quota, or take another type or zone" if "quota" in done.stderr.lower() else ""
            raise Stop(f"cannot create {self.name} ({kind.type}): {last_line(done.stderr)}{hint}", code=code_of(done.stderr))
        self.say(f"{self.name} is there already: {self.look()}")

    def delete(self) -> None:
        """Delete it, and its machine, whatever its state. Raises Stop when it may still be there (and cost)."""
        done = self.tpu("queued-resources", "delete", self.name, "--force")
        if done.returncode and not MISSING.search(done.stderr):
            raise Stop(
                f"{self.name} could not be deleted and may still cost: {last_line(done.stderr)}; {self.how_to_delete()}", code=1
            )
        self.ready = False
        self.paid, self.since = self.seconds(), None

    def look(self) -> str:
        """`state`, through an outage of any length (but not beyond --max-hours)."""
        while True:
            try:
                return self.state()
            except Stop as stop:
                if stop.code != 1:
                    raise
                print(f"{stop}; looking again", file=sys.stderr)
                self.pause(LONGEST)

    def wait(self) -> str:
        """Until it is ACTIVE, NONE or has ended: which of them. Waiting in the queue costs nothing."""
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
        self.say(f"{self.name}: {found}{f' ({self.reason})' if found == 'FAILED' and self.reason else ''}")
        return found

    def how_to_delete(self) -> str:
        project = f" --project {self.project}" if self.project else ""
        return f"delete it with: python3 tpu/tpu.py delete {self.name} --zone {self.zone}{project}"

    # --- its machines ---

    def set_up(self) -> None:
        """The repository's tracked files to ~/jaxppo on every host, and setup_vm.sh. Raises Stop."""
        archive = private(self.name) / ARCHIVE
        if not self.packed and not self.rehearsal:
            pack(archive)
        self.packed = True
        must(self.copy(str(archive), f"{self.name}:{ARCHIVE}"), "copy the code")
        unpack = f"mkdir -p jaxppo && tar -xzf {ARCHIVE} -C jaxppo"
        must(self.ssh(f"{unpack} && JAXPPO_GCSFUSE=1 bash jaxppo/tpu/setup_vm.sh", show=True), "set the hosts up")
        self.ready = True

    def give_environment(self, file: Path) -> None:
        """Secrets: a file with mode 0600 here and there. They are on no command line and in no metadata. Raises Stop."""
        must(self.copy("--scp-flag=-p", str(file), f"{self.name}:.jaxppo.env"), "copy the environment file")

    def job(self, verb: str, *words: str, **how) -> subprocess.CompletedProcess:
        """job.sh on every host."""
        return self.ssh(shlex.join(["bash", "jaxppo/tpu/job.sh", verb, *words]), **how)

    def start(self, run: str, command: list[str]) -> None:
        """In the background on every host. Without its chips JAX fails instead of going on on the CPU. Raises Stop."""
        words = ["env", "JAX_PLATFORMS=tpu,cpu", "bash", "jaxppo/tpu/job.sh", "start", run, "--", *command]
        must(self.ssh(shlex.join(words), show=True), "start the run")

    def hosts(self, run: str) -> list[str] | None:
        """What the run does on each host: running, exit CODE, lost or none. None when they cannot be asked."""
        done = self.job("status", run, patient=False)
        return None if done.returncode else re.findall(r"^jaxppo-host \S+ (running|exit \d+|lost|none)$", done.stdout, re.M)


def begun(node: dict) -> float | None:
    """When a machine was made, in seconds of the clock."""
    try:
        return datetime.fromisoformat(re.sub(r"\.\d+", "", node.get("createTime", ""))).timestamp()
    except ValueError:
        return None


def must(done: subprocess.CompletedProcess, what: str) -> None:
    """Raises Stop, with exit code 1, when a command on the hosts failed."""
    if done.returncode:
        raise Stop(f"cannot {what}: {last_line(done.stderr)}", code=1)


def code_of(stderr: str) -> int:
    """1 for what may pass by itself later, 2 for what will not."""
    return 1 if PASSING.search(stderr) and "quota" not in stderr.lower() else 2
