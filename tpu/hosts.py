"""What is done on the hosts of a slice: they get the code, the secrets and a run, and say how it
is.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from basics import Stop, pack, private
from complaints import at_length, last_line
from slices import Slice

ARCHIVE = "jaxppo.tar.gz"


def set_up(slice_: Slice) -> None:
    """The repository's tracked files to ~/jaxppo on every host, and setup_vm.sh. Raises Stop."""
    archive = private(slice_.name) / ARCHIVE
    if not slice_.packed and not slice_.rehearsal:
        pack(archive)
    slice_.packed = True
    must(slice_.copy(str(archive), f"{slice_.name}:{ARCHIVE}"), "copy the code")
    # A module that is no longer there is not left behind; runs and the environment are.
    unpack = f"mkdir -p jaxppo && rm -rf jaxppo/jaxppo && tar -xzf {ARCHIVE} -C jaxppo"
    must(
        slice_.ssh(f"{unpack} && JAXPPO_GCSFUSE=1 bash jaxppo/tpu/setup_vm.sh", show=True),
        "set the hosts up",
    )
    slice_.ready = True


def give_environment(slice_: Slice, file: Path) -> None:
    """Secrets: a file with mode 0600 here and there. They are on no command line and in no
    metadata. Raises Stop.
    """
    must(
        slice_.copy("--scp-flag=-p", str(file), f"{slice_.name}:.jaxppo.env"),
        "copy the environment file",
    )


def tell(slice_: Slice, verb: str, *words: str, **how) -> subprocess.CompletedProcess:
    """job.sh on every host."""
    return slice_.ssh(shlex.join(["bash", "jaxppo/tpu/job.sh", verb, *words]), **how)


def start(slice_: Slice, run: str, command: list[str]) -> None:
    """In the background on every host. Without its chips JAX fails instead of going on on the CPU.
    Raises Stop.
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
    must(slice_.ssh(shlex.join(words), show=True), "start the run")


def states(slice_: Slice, run: str) -> list[str] | None:
    """What the run does on each host, in their order: running, exit CODE, lost or none. None when
    they cannot be asked.
    """
    done = tell(slice_, "status", run, patient=False)
    found = re.findall(r"^jaxppo-host (\S+) (running|exit \d+|lost|none)$", done.stdout, re.M)
    return (
        None
        if done.returncode
        else [text for _, text in sorted(found, key=lambda line: number(line[0]))]
    )


def number(host: str) -> int:
    """A host's own, from its name on TPU VMs: gcloud prints first what comes first. Any other name
    keeps its place.

    >>> number("t1v-n-0123abcd-w-12"), number("localhost")
    (12, 0)
    """
    found = re.search(r"-w-(\d+)(\.|$)", host)
    return int(found[1]) if found else 0


def must(done: subprocess.CompletedProcess, what: str) -> None:
    """Raises Stop, with exit code 1, when a command on the hosts failed; what they said at length
    goes before its one line.
    """
    if done.returncode:
        if said := at_length(done.stderr):
            print(said, file=sys.stderr)
        raise Stop(f"cannot {what}: {last_line(done.stderr)}", code=1)
