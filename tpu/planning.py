"""Does the job fit the slice? `jaxppo plan` is asked on this machine, before anything is paid
for.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from accelerators import Accelerator
from basics import ROOT, Stop, private
from complaints import last_line
from jobs import Job

INSTALL = "pip install -e '.[tpu-plan]' in the repository, or pass --no-plan"


def plan(job: Job, kind: Accelerator, slice_name: str, *, force: bool, dry_run: bool) -> None:
    """Raises Stop, with exit code 2, when the job cannot fit, or when that cannot be said; with
    `force` only says so.

    Options that the script does not take are an error either way.
    """
    executable = next(filter(None, (shutil.which("jaxppo", path=path) for path in places())), None)
    settings = str(private(slice_name) / "config.json")
    read = [
        python_of(executable),
        str(ROOT / "tpu" / "job_settings.py"),
        settings,
        *job.command(kind)[1:],
    ]
    ask = [executable or "jaxppo", "plan", settings, "--topology", kind.topology]
    print(shlex.join(read), shlex.join(ask), sep="\n", flush=True)
    if dry_run:
        return
    problem = f"jaxppo is not installed here, so nothing says whether the job fits: {INSTALL}"
    if executable:
        problem = settings_problem(read, job.script) or plan_problem(ask, kind)
    if not problem:
        return
    if not force:
        raise Stop(problem)
    print(f"warning: {problem}; going on (--force)", file=sys.stderr)


def places() -> list[str]:
    """Where jaxppo may be: in PATH, beside this Python, in the repository's own environment, which
    the README makes.
    """
    return [
        os.environ.get("PATH", ""),
        os.path.dirname(sys.executable),
        str(ROOT / ".venv" / "bin"),
    ]


def settings_problem(argv: list[str], script: str) -> str:
    """Why the settings cannot be known, or nothing. Raises Stop for options that the script would
    not take either.
    """
    done = run(argv)
    print(done.stdout, end="", flush=True)
    said = last_line(done.stderr).removeprefix("error: ")
    if done.returncode == 2:
        raise Stop(f"{script} would not start: {said}")
    return (
        f"the settings of {script} cannot be read: {said}; mend it, or pass --no-plan"
        if done.returncode
        else ""
    )


def plan_problem(argv: list[str], kind: Accelerator) -> str:
    """Why the job does not fit, or why that is not known, or nothing."""
    done = run(argv)
    print(done.stdout, end="", flush=True)
    if done.returncode == 0:
        return ""
    if done.returncode == 2 and "DOES NOT FIT" in done.stdout:
        return f"the job does not fit {kind.type} ({kind.topology}): change what the plan names, take a larger slice, or --force"
    said = last_line(done.stderr).removeprefix("error: ")
    return (
        f"{said} ({INSTALL})"
        if "tpu-plan" in said
        else f"jaxppo plan failed: {said}; mend it, or pass --no-plan"
    )


def run(argv: list[str]) -> subprocess.CompletedProcess:
    """From the repository's root, as on the slice: paths among the options start there."""
    return subprocess.run(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )


def python_of(executable: str | None) -> str:
    """The Python that an installed command runs with, from its first line; ours where that names
    none.
    """
    if executable:
        with open(executable, "rb") as file:
            first = file.readline(300).decode(errors="replace").strip()
        found = first.removeprefix("#!").strip()
        if (
            first.startswith("#!")
            and Path(found).name.startswith("python")
            and Path(found).exists()
        ):
            return found
    return sys.executable
