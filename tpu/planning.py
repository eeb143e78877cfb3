"""Does the job fit the slice? `jaxppo plan` is asked on this machine, before anything is paid for."""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from basics import ROOT, Stop, last_line

OURS = {"--name", "--runs", "--resume", "--distributed", "--expect-devices"}  # not the plan's business
INSTALL = "pip install -e '.[tpu-plan]' in the repository, or pass --no-plan"


def plan(options: Sequence[str], topology: str, *, force: bool, dry_run: bool) -> None:
    """Raises Stop, with exit code 2, when the job cannot fit, or when that cannot be said; with `force` only says so."""
    known, skipped = plan_options(options)
    executable = shutil.which("jaxppo") or shutil.which("jaxppo", path=os.path.dirname(sys.executable))
    argv = [executable or "jaxppo", "plan", "--topology", topology, *known]
    print(shlex.join(argv), flush=True)
    if skipped:
        print(f"note: the plan does not know {' '.join(skipped)}, nor the script's own defaults")
    if dry_run:
        return
    if not executable:
        problem = f"jaxppo is not installed here, so nothing says whether the job fits: {INSTALL}"
    else:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        print(done.stdout, end="", flush=True)
        if done.returncode == 0:
            return
        if done.returncode == 2 and "DOES NOT FIT" in done.stdout:
            problem = f"the job does not fit {topology}; change what the plan names, take a larger slice, or pass --force"
        elif "tpu-plan" in done.stderr:
            problem = f"{last_line(done.stderr).removeprefix('error: ')} ({INSTALL})"
        else:
            problem = f"jaxppo plan failed: {last_line(done.stderr).removeprefix('error: ')}; mend it, or pass --no-plan"
    if not force:
        raise Stop(problem)
    print(f"warning: {problem}; going on (--force)", file=sys.stderr)


def plan_options(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the options that every run has, with their values; the names of the script's own). Raises Stop."""
    sys.path.append(str(ROOT))
    try:
        from jaxppo.config import RunConfig  # standard library only
    except ImportError:
        raise Stop(f"{ROOT} holds no jaxppo; run tpu.py from a whole checkout, or pass --no-plan") from None
    finally:
        sys.path.remove(str(ROOT))
    names = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(RunConfig)}
    known, skipped, taken = [], [], False
    for word in options:
        if word.startswith("--"):
            name = word.split("=", 1)[0].replace("_", "-")
            name = f"--{name.removeprefix('--no-')}" if name.startswith("--no-") else name
            taken = name in names - OURS
            skipped += [] if taken or name in OURS else [word.split("=", 1)[0]]
        if taken:
            known.append(word)
    return known, skipped
