"""Commands on the hosts of a slice: copy code and secrets, start a run, ask for its state."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from basics import Stop, pack_repository, private_folder
from gcloud_errors import last_line, long_message
from slices import Slice

ARCHIVE = "jaxppo.tar.gz"


def set_up(slice_: Slice) -> None:
    """Copy the tracked files to ~/jaxppo on every host and run setup_vm.sh. Raises Stop."""
    archive = private_folder(slice_.name) / ARCHIVE
    if not slice_.packed and not slice_.rehearsal:
        pack_repository(archive)
    slice_.packed = True
    require_success(slice_.copy(str(archive), f"{slice_.name}:{ARCHIVE}"), "copy the code")
    # Remove the old package, so that no deleted module stays; keep runs and the environment.
    unpack = f"mkdir -p jaxppo && rm -rf jaxppo/jaxppo && tar -xzf {ARCHIVE} -C jaxppo"
    require_success(
        slice_.ssh(f"{unpack} && JAXPPO_GCSFUSE=1 bash jaxppo/tpu/setup_vm.sh", show=True),
        "set the hosts up",
    )
    slice_.ready = True


def copy_environment(slice_: Slice, file: Path) -> None:
    """Copy a file of secrets to every host, with its mode 0600. Raises Stop.

    So they are on no command line and in no metadata.
    """
    require_success(
        slice_.copy("--scp-flag=-p", str(file), f"{slice_.name}:.jaxppo.env"),
        "copy the environment file",
    )


def run_job_script(slice_: Slice, verb: str, *words: str, **how) -> subprocess.CompletedProcess:
    """Run job.sh on every host."""
    return slice_.ssh(shlex.join(["bash", "jaxppo/tpu/job.sh", verb, *words]), **how)


def start_run(slice_: Slice, run: str, command: list[str]) -> None:
    """Start a run in the background on every host. Raises Stop.

    JAX_PLATFORMS makes JAX fail without chips, instead of running on the CPU.
    """
    words = [
        "env",
        "JAX_PLATFORMS=tpu,cpu",
        "bash",
        "jaxppo/tpu/job.sh",
        "start",
        run,
        "--",
        *command,
    ]
    require_success(slice_.ssh(shlex.join(words), show=True), "start the run")


def run_states(slice_: Slice, run: str) -> list[str] | None:
    """Return the run's state on each host, in order: "running", "exit CODE", "lost" or "none".

    Returns None if the hosts do not answer.
    """
    done = run_job_script(slice_, "status", run, patient=False)
    found = re.findall(r"^jaxppo-host (\S+) (running|exit \d+|lost|none)$", done.stdout, re.M)
    if done.returncode:
        return None
    return [text for _, text in sorted(found, key=lambda line: host_number(line[0]))]


def host_number(host: str) -> int:
    """Return a host's number from its name on TPU VMs, or 0 for other names.

    gcloud prints the hosts in the order of their answers.

    >>> host_number("t1v-n-0123abcd-w-12"), host_number("localhost")
    (12, 0)
    """
    found = re.search(r"-w-(\d+)(\.|$)", host)
    return int(found[1]) if found else 0


def require_success(done: subprocess.CompletedProcess, what: str) -> None:
    """Raise Stop, with exit code 1, if a command on the hosts failed.

    A long error output is printed first.
    """
    if done.returncode:
        if said := long_message(done.stderr):
            print(said, file=sys.stderr)
        raise Stop(f"cannot {what}: {last_line(done.stderr)}", code=1)
