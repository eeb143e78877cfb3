"""Run a job to its end through preemptions and crashes, and delete the slice.

The run's exit code decides what happens next.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hosts
from accelerators import Accelerator
from basics import LONGEST, Stop, TimeUp, backoff
from gcloud_errors import last_line
from jobs import Job
from slices import ENDED, Slice

LOOK = 60.0  # seconds between two polls of a run
FAILED_LIMIT = 300.0  # seconds that hosts may continue after the run failed on another host
SILENT_LIMIT = 1800.0  # seconds that a host may not answer
CRASH_MEMORY = 3600.0  # earlier crashes are forgotten after a run of so many seconds
# Seconds to wait after each slice in a row that did not become active; one more ends babysit.
PAUSES = (60.0, 300.0)
GONE = -1  # in place of an exit code: the slice is gone, and the run with it


@dataclass(frozen=True)
class BabysitOptions:
    """The options of babysit."""

    spot: bool = False
    wait_hours: float = 0.0
    gcloud_options: tuple[str, ...] = ()
    env_file: Path | None = None
    max_crashes: int = 3
    keep: bool = False
    ask: Callable[[str], str] | None = None  # asks the user, if there is a terminal


def babysit(slice_: Slice, job: Job, kind: Accelerator, care: BabysitOptions) -> int:
    """Run a job to its end and return its exit code. Raises Stop.

    An existing slice is used, and a run in progress is watched.
    """
    if care.spot and not job.bucket:
        slice_.say(
            "warning: without --runs gs://BUCKET/FOLDER a preemption loses the run, "
            "and it starts from the beginning"
        )
    crashes, stops, ended = 0, 0, None
    try:
        while True:
            ensure_active(slice_, kind, care)
            begun = slice_.clock()
            code = run_once(slice_, job, kind, care)
            if slice_.clock() - begun > CRASH_MEMORY:
                crashes, stops = 0, 0
            if code == GONE:
                slice_.ready = False  # it may come back as a new machine
                hours = slice_.paid_seconds() / 3600
                slice_.say(f"{slice_.name} is gone (preempted?); {hours:.1f} paid hours so far")
                continue
            crashes, stops = crashes + (code == 1), stops + (code == 75)
            if code not in (1, 75) or crashes > care.max_crashes:
                ended = code
                return finish(slice_, job, code, care)
            what = (
                "saved and stopped"
                if code == 75
                else f"crash {crashes} of {care.max_crashes} allowed"
            )
            slice_.say(f"{job.name}: {what}; starting it again")
            slice_.pause(
                backoff(crashes - 1) if code == 1 else backoff(stops) if stops > 3 else 0.0
            )
    except TimeUp:
        return stop_at_limit(slice_, job, ended)


def stop_at_limit(slice_: Slice, job: Job, ended: int | None) -> int:
    """Stop the run and delete the slice when the paid hours are over. Raises Stop.

    Returns the run's exit code if it has `ended`, else 75. Stop means that the slice may still
    exist.
    """
    stopping = "" if ended is not None else f"stopping {job.name}, "
    slice_.say(
        f"{slice_.max_hours:g} paid hours are over (--max-hours): {stopping}deleting {slice_.name}"
    )
    slice_.end_guard()
    if ended is None:
        hosts.run_job_script(slice_, "stop", job.name, patient=False)
    copy_results(slice_, job)
    slice_.delete()
    return 75 if ended is None else ended


def ensure_active(slice_: Slice, kind: Accelerator, care: BabysitOptions) -> None:
    """Wait for an active slice, and create one if there is none. Raises Stop, TimeUp.

    A slice that somebody else deleted is not created again.
    """
    created = 0
    while (found := slice_.wait()) != "ACTIVE":
        if found == "NONE" and slice_.ours:
            raise deleted_by_others(slice_)
        if found in ENDED:
            slice_.delete()
        if created > len(PAUSES):
            why = f" ({slice_.reason})" if slice_.reason else ""
            raise Stop(
                f"{slice_.name} did not become active {created} times in a row{why}; "
                "try another zone or type",
                code=1,
            )
        if created:
            slice_.pause(PAUSES[created - 1])
        created += request_slice(slice_, kind, care)


def request_slice(slice_: Slice, kind: Accelerator, care: BabysitOptions) -> bool:
    """Request a slice and return whether that worked. Raises Stop.

    After a transient error it waits, and returns False.
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


def run_once(slice_: Slice, job: Job, kind: Accelerator, care: BabysitOptions) -> int:
    """Start the run on an active slice and watch it. Raises Stop, TimeUp.

    Returns its exit code, 1 if it cannot be started, or GONE.
    """
    try:
        prepare_hosts(slice_, job, kind, care)
        return watch_run(slice_, job, kind)
    except Stop as stop:
        if stop.code != 1:
            raise
        if not is_active(slice_):
            return GONE
        print(f"error: {stop}", file=sys.stderr)
        return 1


def is_active(slice_: Slice) -> bool:
    """Return whether the slice is active. Raises Stop if somebody else deletes it."""
    found = slice_.poll()
    if found in ("NONE", "DELETING"):
        raise deleted_by_others(slice_)
    return found == "ACTIVE"


def deleted_by_others(slice_: Slice) -> Stop:
    """Return the error for a slice that somebody else deleted."""
    return Stop(
        f"{slice_.name} was deleted by somebody else, and is not created again; "
        "call the same command to create it",
        code=75,
    )


def prepare_hosts(slice_: Slice, job: Job, kind: Accelerator, care: BabysitOptions) -> None:
    """Copy code and secrets to the hosts and start the run, unless it is running. Raises Stop."""
    if "running" in (hosts.run_states(slice_, job.name) or []):
        slice_.say(f"{job.name} is running on {slice_.name} already")
        return
    if not slice_.ready:
        hosts.set_up(slice_)
        if care.env_file:
            hosts.copy_environment(slice_, care.env_file)
    # Stop the run where it may still be running, so that all hosts start together.
    hosts.run_job_script(slice_, "stop", job.name)
    hosts.start_run(slice_, job.name, job.command(kind))


def watch_run(slice_: Slice, job: Job, kind: Accelerator) -> int:
    """Wait for the end of the run; return its exit code, or GONE. Raises Stop, TimeUp."""
    failing, silent, ended = 0.0, 0.0, []
    while is_active(slice_):
        found = hosts.run_states(slice_, job.name)
        if found is None or len(found) != kind.hosts:
            silent += LOOK
            if silent > SILENT_LIMIT:
                raise Stop(
                    f"not all of {kind.hosts} hosts of {slice_.name} have answered "
                    f"for {silent / 60:.0f} minutes",
                    code=1,
                )
        elif "running" not in found:
            return combined_exit_code(ended or found)
        else:
            silent = 0.0
            failed = [text for text in found if text not in ("running", "exit 0")]
            failing = failing + LOOK if failed else 0.0
            if failing > FAILED_LIMIT:
                slice_.say(f"{job.name}: {', '.join(found)}; stopping the others")
                ended = ended or failed  # hosts that are stopped here end with 75
                hosts.run_job_script(slice_, "stop", job.name)
        slice_.pause(LOOK)
    return GONE


def combined_exit_code(found: list[str]) -> int:
    """Return one exit code for the run; codes that no restart cures come first.

    >>> (
    ...     combined_exit_code(["exit 0", "exit 0"]),
    ...     combined_exit_code(["exit 134", "exit 2"]),
    ...     combined_exit_code(["exit 75", "exit 1"]),
    ...     combined_exit_code(["exit 0", "lost"]),
    ... )
    (0, 2, 75, 1)
    """
    codes = [int(text.split()[1]) if text.startswith("exit") else 1 for text in found]
    return next((code for code in (2, 76, 75) if code in codes), 1 if any(codes) else 0)


def finish(slice_: Slice, job: Job, code: int, care: BabysitOptions) -> int:
    """Copy results that only the slice has, and delete it unless it is kept. Raises Stop."""
    if code:
        log = Path(f"{job.name}.log")
        where = keep_log(slice_, job, log)
        reason = {2: "bad input or configuration", 76: "diverged"}.get(code, "crashed too often")
        print(f"error: {job.name}: {reason} (exit code {code}); {where}", file=sys.stderr)
    keep = care.keep or not copy_results(slice_, job)
    if code and not keep and care.ask:
        answer = care.ask(f"delete {slice_.name}, which costs as long as it exists? [Y/n] ")
        keep = answer.strip().lower().startswith("n")
    if keep:
        slice_.say(f"{slice_.name} is kept and costs; {slice_.how_to_delete()}")
    else:
        slice_.end_guard()
        slice_.delete()
        slice_.say(f"{slice_.name} is deleted; {slice_.paid_seconds() / 3600:.1f} paid hours")
    return code


def keep_log(slice_: Slice, job: Job, log: Path) -> str:
    """Write the run's last lines to a file; return a phrase that says where they are."""
    try:
        log.write_text(hosts.run_job_script(slice_, "log", job.name, "1000", "named").stdout)
    except OSError as error:  # a full disk on this machine must not keep the slice
        return f"its last lines could not be written to {log} ({error.strerror})"
    return f"its last lines are in {log}"


def copy_results(slice_: Slice, job: Job) -> bool:
    """Copy a run that is not in a bucket to ./runs; return whether the slice can be deleted."""
    if job.bucket:
        return True
    there = f"{job.runs if job.runs.startswith('/') else f'jaxppo/{job.runs}'}/{job.name}"
    here = Path("runs")
    try:
        if not slice_.rehearsal:
            here.mkdir(exist_ok=True)
    except OSError as error:
        print(
            f"error: cannot copy {there}: cannot make the folder {here} ({error.strerror})",
            file=sys.stderr,
        )
        return False
    done = slice_.copy("--recurse", f"{slice_.name}:{there}", f"{here}/", worker="0")
    if done.returncode:
        print(f"error: cannot copy {there}: {last_line(done.stderr)}", file=sys.stderr)
    return done.returncode == 0 or "No such file" in done.stderr
