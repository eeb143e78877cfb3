#!/usr/bin/env python3
"""Run jobs on Cloud TPU slices: create, wait, setup, run, logs, status, stop, delete, babysit.

    python3 tpu/tpu.py babysit my-run --zone us-east5-b --type v6e-16 --spot --max-hours 12 -- \\
        experiments/sentiment.py --runs gs://my-bucket/runs --batch-size 256

does everything: it plans, creates and sets up the slice, starts the job, creates a new slice after
each preemption, resumes from the newest checkpoint, and deletes the slice at the end. Step by step:

    python3 tpu/tpu.py create my-run --zone us-east5-b --type v6e-8
    python3 tpu/tpu.py wait   my-run --zone us-east5-b
    python3 tpu/tpu.py setup  my-run --zone us-east5-b --env-file secrets.env
    python3 tpu/tpu.py run    my-run --zone us-east5-b --type v6e-8 -- \\
        experiments/sentiment.py --steps 200
    python3 tpu/tpu.py logs   my-run --zone us-east5-b --follow
    python3 tpu/tpu.py delete my-run --zone us-east5-b

--dry-run prints the commands as a script and runs none. After -- comes the job: a script of this
repository and its options. A restart resumes the run of the same --name (default: the slice's).
Exit codes, the job's and ours: 0 done; 1 crash; 2 bad input, or the job does not fit; 75 saved and
stopped, the same command resumes; 76 diverged; 130 Ctrl-C (the run on the slice continues).
"""

from __future__ import annotations

import argparse
import difflib
import re
import select
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import hosts
from accelerators import ACCELERATORS, Accelerator
from babysitting import BabysitOptions, babysit
from basics import Stop, find_secrets, lock_slice
from jobs import NAME, check_agent, check_bucket, check_environment, parse_job
from planning import check_fit
from rehearsal import Rehearsal
from slices import LOG_TIMEOUT, Slice

VERBS = ("create", "wait", "setup", "run", "logs", "status", "stop", "delete", "babysit")
OLDEST = (3, 11)  # Python
Ask = Callable[[str], str]


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Stop(f"{message}; see --help")


def parser() -> Parser:
    """Return the parser of the command line up to --."""
    out = Parser(
        "tpu.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = out.add_argument
    add("verb", choices=VERBS)
    add(
        "name", help="name of the slice, and of the run unless the job has a --name: a-z, 0-9 and -"
    )
    add("--zone", required=True, help="for example us-east5-b")
    add("--project", default="", help="default: gcloud's project")
    add("--type", default="", help="create, run, babysit: v4-8, v5litepod-16, v5p-8, v6e-8 ...")
    add("--spot", action="store_true", help="cheaper, and may be preempted at any time")
    add(
        "--wait-hours",
        type=float,
        default=0,
        help="cancel a request that is not met by then (default: never)",
    )
    add(
        "--gcloud-option",
        action="append",
        default=[],
        metavar="=--OPTION=VALUE",
        help="an option for `gcloud ... create`; repeatable",
    )
    add(
        "--env-file",
        type=Path,
        help="setup, run, babysit: file of NAME=VALUE lines for the job (tokens); mode 0600",
    )
    add(
        "--max-hours",
        type=float,
        default=24,
        help="babysit: paid hours after which the slice is deleted (default 24)",
    )
    add(
        "--max-crashes",
        type=int,
        default=3,
        help="babysit: restarts after crashes, forgotten after an hour without one (default 3)",
    )
    add(
        "--keep",
        action="store_true",
        help="babysit: do not delete the slice at the end (but --max-hours does)",
    )
    add(
        "--no-plan",
        action="store_true",
        help="do not check with `jaxppo plan` whether the job fits",
    )
    add("--force", action="store_true", help="start the job even if it does not fit")
    add("--run", default="", help="logs, status, stop: the run's name (default: the slice's)")
    add("--worker", default="0", help="logs: which host (default 0), or all")
    add("--lines", type=int, default=100, help="logs: how many (default 100)")
    add("--follow", action="store_true", help="logs: print new lines as they come")
    add("--dry-run", action="store_true", help="print the commands instead of running them")
    return out


def check_options(options: argparse.Namespace, words: list[str]) -> None:
    """Raise Stop for a wrong option."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", options.name):
        raise Stop(
            f"name {options.name!r}: use 1 to 63 of a-z, 0-9 and '-', "
            "a letter first, no '-' at the end"
        )
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", options.zone):
        raise Stop(f"--zone {options.zone!r} is not a zone; write one like us-east5-b")
    if options.run and not re.fullmatch(NAME, options.run):
        raise Stop(f"--run {options.run!r}: use 1 to 64 letters, digits, '.', '_' or '-'")
    if not re.fullmatch(r"all|\d+", options.worker) or options.lines < 1:
        raise Stop(
            f"--worker {options.worker} --lines {options.lines}: "
            "give a host's number or all, and lines above 0"
        )
    if (
        not 0 < options.max_hours < float("inf")
        or not 0 <= options.wait_hours < float("inf")
        or options.max_crashes < 0
    ):
        raise Stop(
            f"--max-hours {options.max_hours:g} must be above 0, "
            "--max-crashes and --wait-hours not below 0, and all finite"
        )
    if found := find_secrets(options.gcloud_option):
        raise Stop(
            f"--gcloud-option {found[0]}: all users of a machine can read its command lines; "
            "pass --env-file"
        )
    if words and options.verb not in ("run", "babysit"):
        raise Stop(f"{options.verb} takes no job; remove -- and what follows it")
    if options.env_file:
        check_environment(options.env_file)


def accelerator_of(options: argparse.Namespace) -> Accelerator:
    """Return the slice of --type. Raises Stop."""
    if options.type not in ACCELERATORS:
        near = difflib.get_close_matches(
            options.type.replace("v5e", "v5litepod"), ACCELERATORS, n=3, cutoff=0.5
        )
        raise Stop(
            f"--type {options.type!r} is unknown; perhaps {', '.join(near) or 'v6e-8'} "
            "(tpu/README.md lists all)"
        )
    return ACCELERATORS[options.type]


def perform(options: argparse.Namespace, words: list[str], slice_: Slice, ask: Ask | None) -> int:
    """Execute a verb and return the exit code. Raises Stop."""
    check_options(options, words)
    if options.verb == "babysit" and not options.dry_run:
        with lock_slice(options.name):
            return perform_job(options, words, slice_, ask)
    if options.verb in ("run", "babysit"):
        return perform_job(options, words, slice_, ask)
    if options.verb in ("logs", "status", "stop"):
        return perform_run(options, options.run or options.name, slice_, ask)
    if options.verb == "delete":
        return perform_delete(slice_)
    if options.verb == "create":
        kind = accelerator_of(options)
        slice_.type = kind.type
        if not options.dry_run:
            check_agent(kind)
        slice_.create(
            kind,
            spot=options.spot,
            wait_hours=options.wait_hours,
            extra=tuple(options.gcloud_option),
        )
        slice_.say(f"requested {options.name} ({kind.type}); it costs once it is active")
    elif options.verb == "wait":
        if (found := slice_.wait()) != "ACTIVE":
            raise Stop(
                f"{options.name} is not active ({found}); delete it if it has ended, and create it",
                code=1,
            )
    else:
        hosts.set_up(slice_)
        if options.env_file:
            hosts.copy_environment(slice_, options.env_file)
    slice_.say(slice_.how_to_delete())
    return 0


def perform_delete(slice_: Slice) -> int:
    """Delete the slice and say whether it existed. Raises Stop."""
    if slice_.delete():
        slice_.say(f"{slice_.name} is deleted")
    else:
        project = f"project {slice_.project}" if slice_.project else "gcloud's project"
        slice_.say(
            f"{slice_.name} is not in {slice_.zone} ({project}): nothing was deleted; "
            f"to list slices: gcloud compute tpus queued-resources list {slice_.location}"
        )
    return 0


def perform_run(options: argparse.Namespace, run: str, slice_: Slice, ask: Ask | None) -> int:
    """Execute logs, status or stop. Raises Stop."""
    if options.verb == "logs":
        if options.follow and options.worker == "all":
            raise Stop(
                "--follow shows one host: with several, gcloud prints nothing before all have "
                "finished; give --worker 0"
            )
        how = {"worker": options.worker, "show": True}
        words = [str(options.lines), *["named"] * (options.worker == "all")]
        if options.follow:
            slice_.command_timeout = LOG_TIMEOUT
            done = slice_.ssh(
                f"tail -n {options.lines} -F .jaxppo-jobs/{run}/log", patient=False, **how
            )
        else:
            done = hosts.run_job_script(slice_, "log", run, *words, **how)
        hosts.require_success(done, "read the log")
    elif options.verb == "status":
        found = slice_.state()
        texts = hosts.run_states(slice_, run) if found == "ACTIVE" else []
        slice_.say(f"{options.name}: {found}, {slice_.paid_seconds() / 3600:.1f} paid hours")
        for number, text in enumerate(["its hosts do not answer"] if texts is None else texts):
            slice_.say(f"  host {number}: {text}")
        if found != "NONE":
            slice_.say(slice_.how_to_delete())
    else:
        hosts.require_success(hosts.run_job_script(slice_, "stop", run, show=True), "stop the run")
        question = f"delete {options.name}, which costs as long as it exists? [y/N] "
        if ask and ask(question).strip().lower().startswith("y"):
            return perform_delete(slice_)
        slice_.say(f"{options.name} is there and costs; {slice_.how_to_delete()}")
    return 0


def perform_job(
    options: argparse.Namespace, words: list[str], slice_: Slice, ask: Ask | None
) -> int:
    """Execute run or babysit, after all checks that are possible before. Raises Stop."""
    kind = accelerator_of(options)
    slice_.type = kind.type
    job = parse_job(words, options.name, kind)
    if not options.dry_run:
        check_agent(kind)
    check_bucket(slice_, job)
    if not options.no_plan:
        check_fit(job, kind, options.name, force=options.force, dry_run=options.dry_run)
    if options.verb == "babysit":
        slice_.max_hours = options.max_hours
        care = BabysitOptions(
            options.spot,
            options.wait_hours,
            tuple(options.gcloud_option),
            options.env_file,
            options.max_crashes,
            options.keep,
            ask,
        )
        try:
            return babysit(slice_, job, kind, care)
        except Stop as stop:
            raise Stop(f"{stop}; {slice_.may_cost()}", stop.code) from None
        except Exception:  # a bug: say also that the slice may still exist
            print(f"error: {slice_.may_cost()}", file=sys.stderr)
            raise
    if (found := slice_.state()) != "ACTIVE":
        raise Stop(
            f"{options.name} is not ready ({found}); call tpu.py create, wait and setup first",
            code=1,
        )
    if options.env_file:
        hosts.copy_environment(slice_, options.env_file)
    hosts.start_run(slice_, job.name, job.command(kind))
    number = f"{kind.hosts} host{'s' * (kind.hosts > 1)}"
    slice_.say(f"{job.name} runs on {number}, unattended; {slice_.how_to_delete()}")
    return 0


def ask_person(question: str, seconds: float = 600) -> str:
    """Return the user's answer, or an empty text after `seconds`: a slice costs while it waits."""
    print(question, end="", flush=True)
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.readline() if ready else ""


def main(
    args: Sequence[str] | None = None, *, sleep=time.sleep, clock=time.time, ask: Ask | None = None
) -> int:
    """Run the command line and return the exit code; errors are one line on stderr.

    Tests replace `sleep`, `clock` and `ask`.
    """
    if sys.version_info[:2] < OLDEST:
        found = ".".join(map(str, sys.version_info[:3]))
        print(
            f"error: tpu.py needs Python 3.11 or newer, and this is {found}; "
            "try python3.12 tpu/tpu.py",
            file=sys.stderr,
        )
        return 2
    given = list(sys.argv[1:] if args is None else args)
    cut = given.index("--") if "--" in given else len(given)
    slice_ = None
    try:
        options = parser().parse_args(given[:cut])
        rehearsal = (
            Rehearsal(there=options.verb not in ("create", "babysit")) if options.dry_run else None
        )
        slice_ = Slice(
            options.name, options.zone, options.project, rehearsal, sleep=sleep, clock=clock
        )
        return perform(options, given[cut + 1 :], slice_, ask)
    except Stop as stop:
        told = not slice_ or stop.code == 2 or slice_.how_to_delete() in str(stop)
        print(f"error: {stop}" if told else f"error: {stop}; {slice_.may_cost()}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        hint = (
            f"; the run on the slice continues, and costs; {slice_.how_to_delete()}"
            if slice_
            else ""
        )
        print(f"\nstopped{hint}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(ask=ask_person if sys.stdin.isatty() else None))
