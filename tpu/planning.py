"""Check with `jaxppo plan`, on this machine, that a job fits a slice before anything costs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from accelerators import Accelerator
from basics import ROOT, Stop, private_folder
from gcloud_errors import last_line
from jobs import Job

INSTALL = "pip install -e '.[tpu-plan]' in the repository, or pass --no-plan"


def check_fit(job: Job, kind: Accelerator, slice_name: str, *, force: bool, dry_run: bool) -> None:
    """Raise Stop, with exit code 2, if the job does not fit or the plan fails.

    With `force` this is a warning only. Unknown options of the script are always an error.
    """
    found = (shutil.which("jaxppo", path=path) for path in search_paths())
    executable = next(filter(None, found), None)
    settings = str(private_folder(slice_name) / "config.json")
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
    problem = f"jaxppo is not installed here, so it is unknown whether the job fits: {INSTALL}"
    if executable:
        problem = settings_problem(read, job.script) or plan_problem(ask, kind)
    if not problem:
        return
    if not force:
        raise Stop(problem)
    print(f"warning: {problem}; continuing (--force)", file=sys.stderr)


def search_paths() -> list[str]:
    """Return where jaxppo may be: PATH, this Python's folder, the .venv of the README."""
    return [
        os.environ.get("PATH", ""),
        os.path.dirname(sys.executable),
        str(ROOT / ".venv" / "bin"),
    ]


def settings_problem(argv: list[str], script: str) -> str:
    """Return why the settings cannot be read, or an empty text.

    Raises Stop for options that the script would refuse, too.
    """
    done = run(argv)
    print(done.stdout, end="", flush=True)
    said = last_line(done.stderr).removeprefix("error: ")
    if done.returncode == 2:
        raise Stop(f"{script} would not start: {said}")
    if done.returncode:
        return f"the settings of {script} cannot be read: {said}; fix it, or pass --no-plan"
    return ""


def plan_problem(argv: list[str], kind: Accelerator) -> str:
    """Return why the job does not fit or the plan failed, or an empty text."""
    done = run(argv)
    print(done.stdout, end="", flush=True)
    if done.returncode == 0:
        return ""
    if done.returncode == 2 and "DOES NOT FIT" in done.stdout:
        return (
            f"the job does not fit {kind.type} ({kind.topology}): "
            "change what the plan names, use a larger slice, or --force"
        )
    said = last_line(done.stderr).removeprefix("error: ")
    if "tpu-plan" in said:
        return f"{said} ({INSTALL})"
    return f"jaxppo plan failed: {said}; fix it, or pass --no-plan"


def run(argv: list[str]) -> subprocess.CompletedProcess:
    """Run a command in the repository's root, where paths in options start, as on the slice."""
    return subprocess.run(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )


def python_of(executable: str | None) -> str:
    """Return the Python in the first line of an installed command, or this Python."""
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
