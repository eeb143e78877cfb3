"""From nothing to a finished run and no slice, through preemptions and crashes: the exit codes
decide what is done next.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hosts
from accelerators import Accelerator
from basics import LONGEST, Stop, TimeUp, backoff
from complaints import last_line
from jobs import Job
from slices import ENDED, Slice

LOOK = 60.0  # seconds between two looks at a run
LONELY = 300.0  # seconds that some hosts may run on after another one's run has failed
UNSEEN = 1800.0  # seconds that a host may not answer
STEADY = 3600.0  # a run that lived so long has got over its earlier crashes
PAUSES = (
    60.0,
    300.0,
)  # seconds after each new slice in a row that did not become active; after one more it gives up
GONE = -1  # the slice, and the run with it


@dataclass(frozen=True)
class Care:
    """How to look after a run."""

    spot: bool = False
    wait_hours: float = 0.0
    gcloud_options: tuple[str, ...] = ()
    env_file: Path | None = None
    max_crashes: int = 3
    keep: bool = False
    ask: Callable[[str], str] | None = None  # a person, if there is one


def babysit(slice_: Slice, job: Job, kind: Accelerator, care: Care) -> int:
    """The run's exit code. A slice that is there is used, a run that is going on is watched. Raises
    Stop.
    """
    if care.spot and not job.bucket:
        slice_.say(
            "warning: without --runs gs://BUCKET/FOLDER a preemption loses the run, and it starts from nothing"
        )
    crashes, stops, ended = 0, 0, None
    try:
        while True:
            ensure(slice_, kind, care)
            begun = slice_.clock()
            code = attempt(slice_, job, kind, care)
            if slice_.clock() - begun > STEADY:
                crashes, stops = 0, 0
            if code == GONE:
                slice_.ready = False  # a machine that comes back may be a new one
                slice_.say(
                    f"{slice_.name} is gone (preempted?); {slice_.seconds() / 3600:.1f} paid hours so far"
                )
                continue
            crashes, stops = crashes + (code == 1), stops + (code == 75)
            if code not in (1, 75) or crashes > care.max_crashes:
                ended = code
                return finish(slice_, job, code, care)
            what = (
                "saved and stopped"
                if code == 75
                else f"crash {crashes} of {care.max_crashes} that are allowed"
            )
            slice_.say(f"{job.name}: {what}; starting it again")
            slice_.pause(
                backoff(crashes - 1) if code == 1 else backoff(stops) if stops > 3 else 0.0
            )
    except TimeUp:
        return cut_off(slice_, job, ended)


def cut_off(slice_: Slice, job: Job, ended: int | None) -> int:
    """The paid hours are over: the run's exit code, if it has `ended`. Raises Stop when the slice
    may still be there.
    """
    stopping = "" if ended is not None else f"stopping {job.name}, "
    slice_.say(
        f"{slice_.max_hours:g} paid hours are over (--max-hours): {stopping}deleting {slice_.name}"
    )
    slice_.hasten()
    if ended is None:
        hosts.tell(slice_, "stop", job.name, patient=False)
    fetch(slice_, job)
    slice_.delete()
    return 75 if ended is None else ended


def ensure(slice_: Slice, kind: Accelerator, care: Care) -> None:
    """An active slice: the one that is there, or a new one, but none for one that was taken from
    us. Raises Stop, TimeUp.
    """
    created = 0
    while (found := slice_.wait()) != "ACTIVE":
        if found == "NONE" and slice_.ours:
            raise taken(slice_)
        if found in ENDED:
            slice_.delete()
        if created > len(PAUSES):
            why = f" ({slice_.reason})" if slice_.reason else ""
            raise Stop(
                f"{slice_.name} did not become active {created} times in a row{why}; try another zone or type",
                code=1,
            )
        if created:
            slice_.pause(PAUSES[created - 1])
        created += request(slice_, kind, care)


def request(slice_: Slice, kind: Accelerator, care: Care) -> bool:
    """Whether it is asked for; what passes by itself is slept through, and is no failure. Raises
    Stop.
    """
    try:
        slice_.create(kind, spot=care.spot, wait_hours=care.wait_hours, extra=care.gcloud_options)
    except Stop as stop:
        if stop.code != 1:
            raise
        print(f"{stop}; asking again in {LONGEST:.0f} s", file=sys.stderr)
        slice_.pause(LONGEST)
        return False
    return True


def attempt(slice_: Slice, job: Job, kind: Accelerator, care: Care) -> int:
    """Start the run on an active slice and watch it: its exit code, 1 when it cannot be started,
    GONE. Raises Stop, TimeUp.
    """
    try:
        prepare(slice_, job, kind, care)
        return watch(slice_, job, kind)
    except Stop as stop:
        if stop.code != 1:
            raise
        if not is_there(slice_):
            return GONE
        print(f"error: {stop}", file=sys.stderr)
        return 1


def is_there(slice_: Slice) -> bool:
    """Whether the slice is active. One that somebody else deletes is not made again: Stop."""
    found = slice_.look()
    if found in ("NONE", "DELETING"):
        raise taken(slice_)
    return found == "ACTIVE"


def taken(slice_: Slice) -> Stop:
    return Stop(
        f"{slice_.name} was deleted by somebody else, and is not made again; the same command would",
        code=75,
    )


def prepare(slice_: Slice, job: Job, kind: Accelerator, care: Care) -> None:
    """Code, secrets and the run itself onto the hosts, unless the run is going on there. Raises
    Stop.
    """
    if "running" in (hosts.states(slice_, job.name) or []):
        slice_.say(f"{job.name} is running on {slice_.name} already")
        return
    if not slice_.ready:
        hosts.set_up(slice_)
        if care.env_file:
            hosts.give_environment(slice_, care.env_file)
    hosts.tell(slice_, "stop", job.name)  # what a host may still be doing: all start together
    hosts.start(slice_, job.name, job.command(kind))


def watch(slice_: Slice, job: Job, kind: Accelerator) -> int:
    """The run's exit code, or GONE. Raises Stop, TimeUp."""
    lonely, unseen, ended = 0.0, 0.0, []
    while is_there(slice_):
        found = hosts.states(slice_, job.name)
        if found is None or len(found) != kind.hosts:
            unseen += LOOK
            if unseen > UNSEEN:
                raise Stop(
                    f"not all of {kind.hosts} hosts of {slice_.name} answer, for {unseen / 60:.0f} minutes now",
                    code=1,
                )
        elif "running" not in found:
            return worst(ended or found)
        else:
            unseen = 0.0
            failed = [text for text in found if text not in ("running", "exit 0")]
            lonely = lonely + LOOK if failed else 0.0
            if lonely > LONELY:
                slice_.say(f"{job.name}: {', '.join(found)}; stopping the others")
                ended = (
                    ended or failed
                )  # these ended the run; what we stop ends with 75, and is no reason
                hosts.tell(slice_, "stop", job.name)
        slice_.pause(LOOK)
    return GONE


def worst(found: list[str]) -> int:
    """One exit code for the run: what no restart cures comes first.

    >>> (
    ...     worst(["exit 0", "exit 0"]),
    ...     worst(["exit 134", "exit 2"]),
    ...     worst(["exit 75", "exit 1"]),
    ...     worst(["exit 0", "lost"]),
    ... )
    (0, 2, 75, 1)
    """
    codes = [int(text.split()[1]) if text.startswith("exit") else 1 for text in found]
    return next((code for code in (2, 76, 75) if code in codes), 1 if any(codes) else 0)


def finish(slice_: Slice, job: Job, code: int, care: Care) -> int:
    """Bring home what only the slice has, and delete it unless it is to be kept. Raises Stop."""
    if code:
        log = Path(f"{job.name}.log")
        where = keep_log(slice_, job, log)
        reason = {2: "bad input or configuration", 76: "diverged"}.get(code, "crashed too often")
        print(f"error: {job.name}: {reason} (exit code {code}); {where}", file=sys.stderr)
    keep = care.keep or not fetch(slice_, job)
    if code and not keep and care.ask:
        answer = care.ask(f"delete {slice_.name}, which costs as long as it is there? [Y/n] ")
        keep = answer.strip().lower().startswith("n")
    if keep:
        slice_.say(f"{slice_.name} is kept and costs; {slice_.how_to_delete()}")
    else:
        slice_.hasten()
        slice_.delete()
        slice_.say(f"{slice_.name} is deleted; {slice_.seconds() / 3600:.1f} paid hours")
    return code


def keep_log(slice_: Slice, job: Job, log: Path) -> str:
    """Put the run's last lines into a file; where they are."""
    try:
        log.write_text(hosts.tell(slice_, "log", job.name, "1000", "named").stdout)
    except OSError as error:  # a full disk here must not keep a slice there
        return f"its last lines could not be written to {log} ({error.strerror})"
    return f"its last lines are in {log}"


def fetch(slice_: Slice, job: Job) -> bool:
    """A run that is not in a bucket comes to ./runs before its machine goes. Whether nothing is
    lost then.
    """
    if job.bucket:
        return True
    there = f"{job.runs if job.runs.startswith('/') else f'jaxppo/{job.runs}'}/{job.name}"
    here = Path("runs")
    try:
        if not slice_.rehearsal:
            here.mkdir(exist_ok=True)
    except OSError as error:
        print(
            f"error: {there} could not be copied: {here} cannot be made ({error.strerror})",
            file=sys.stderr,
        )
        return False
    done = slice_.copy("--recurse", f"{slice_.name}:{there}", f"{here}/", worker="0")
    if done.returncode:
        print(f"error: {there} could not be copied: {last_line(done.stderr)}", file=sys.stderr)
    return done.returncode == 0 or "No such file" in done.stderr
