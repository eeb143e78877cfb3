"""Errors, pauses, and what of the repository goes to a slice."""

import fcntl
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from complaints import last_line

ROOT = Path(__file__).resolve().parents[1]
SHORTEST, LONGEST = 10.0, 120.0  # seconds between two attempts, or two looks
SECRET = re.compile(
    r"(^|[-_])(token|secret|password|passwd|(api)?key|credentials?)$", re.IGNORECASE
)
KEY = re.compile(
    r"\b(hf_|sk-|ghp_|AIza|ya29\.)[A-Za-z0-9_-]{16,}"
)  # what keys of known services look like
LINK = re.compile(r"(\w+://[^/\s:@]*):[^/\s@]+@")  # with somebody's password


class Stop(Exception):
    """One line that says what is wrong and what to do, and the exit code."""

    def __init__(self, text: str, code: int = 2):
        super().__init__(text)
        self.code = code


class TimeUp(Exception):
    """The slice has been paid for as long as --max-hours allows."""


def backoff(number: int) -> float:
    """Seconds to wait after attempt `number` (from 0): doubled each time, capped.

    >>> [backoff(i) for i in range(6)]
    [10.0, 20.0, 40.0, 80.0, 120.0, 120.0]
    """
    return min(SHORTEST * 2 ** min(number, 20), LONGEST)


def secrets(words: Iterable[str]) -> list[str]:
    """The options that seem to carry a secret, without it: everybody on a machine can read a
    command line.

    >>> secrets(
    ...     [
    ...         "--hf-token=x",
    ...         "--metadata=HF_TOKEN=x,a=b",
    ...         "--tokens",
    ...         "bpe",
    ...         "--wandb-api-key",
    ...         "sk-0123456789abcdef0",
    ...     ]
    ... )
    ['--hf-token', '--metadata=HF_TOKEN', '--wandb-api-key', 'sk-...']
    >>> secrets(
    ...     [
    ...         "--wandb-key",
    ...         "--key=x",
    ...         "--access-key",
    ...         "--url=https://me:x@host/a",
    ...         "--keys",
    ...         "http://host:80/a@b",
    ...     ]
    ... )
    ['--wandb-key', '--key', '--access-key', 'https://me:...@']
    """
    found = []
    for word in words:
        pieces = word.split("=")
        names = [re.split(r"[,^]", piece)[-1] for piece in pieces[:-1]] or [word] * word.startswith(
            "--"
        )
        if named := next((name for name in names if SECRET.search(name.lstrip("-"))), ""):
            found.append(word[: word.index(named) + len(named)])
        elif key := KEY.search(word):
            found.append(f"{key[1]}...")
        elif link := LINK.search(word):
            found.append(f"{link[1]}:...@")
    return found


def private(name: str) -> Path:
    """A folder of ours for what is made on the way to a slice: always the same one, and nobody
    else's. Raises Stop.
    """
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxppo" / "tpu" / name
    )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(
            f"cannot write to {folder} ({error.strerror}); set XDG_CACHE_HOME to a folder of yours"
        ) from None
    return folder


@contextmanager
def alone(name: str) -> Iterator[None]:
    """While one process of this machine looks after a slice no other one does: they would undo each
    other's work. Raises Stop.
    """
    lock = private(name) / "lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(
                f"another babysit of {name} is running on this machine; end that one first (Ctrl-C)"
            ) from None
        except OSError as error:
            raise Stop(
                f"{lock} cannot be locked ({error.strerror}); set XDG_CACHE_HOME to a folder on another disk"
            ) from None
        yield


def pack(archive: Path) -> None:
    """Tracked files only: nothing that lies about by chance, such as a key, leaves this machine.
    Raises Stop.
    """
    names = tracked()
    with tarfile.open(archive, "w:gz") as out:
        for name in names:
            if os.path.lexists(ROOT / name):
                out.add(ROOT / name, arcname=name, recursive=False)


def tracked() -> list[str]:
    """The repository's tracked files. Raises Stop."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True
        )
    except FileNotFoundError:
        raise Stop(
            "git is missing, which says what of the repository goes to the slice; install it"
        ) from None
    if done.returncode:
        raise Stop(f"{ROOT} is no git checkout: {last_line(done.stderr)}")
    return [name for name in done.stdout.split("\0") if name]
