"""Errors, pauses, secrets on command lines, and the repository's files."""

import fcntl
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gcloud_errors import last_line

ROOT = Path(__file__).resolve().parents[1]
SHORTEST, LONGEST = 10.0, 120.0  # seconds between two attempts or polls
SECRET = re.compile(
    r"(^|[-_])(token|secret|password|passwd|(api)?key|credentials?)$", re.IGNORECASE
)
# Keys of known services.
KEY = re.compile(r"\b(hf_|sk-|ghp_|AIza|ya29\.)[A-Za-z0-9_-]{16,}")
LINK = re.compile(r"(\w+://[^/\s:@]*):[^/\s@]+@")  # with a password


class Stop(Exception):
    """An error for the user: one line with what is wrong and what to do, and the exit code."""

    def __init__(self, text: str, code: int = 2):
        super().__init__(text)
        self.code = code


class TimeUp(Exception):
    """The paid hours of --max-hours are over."""


def backoff(number: int) -> float:
    """Return the seconds to wait after attempt `number` (from 0): doubled each time, capped.

    >>> [backoff(i) for i in range(6)]
    [10.0, 20.0, 40.0, 80.0, 120.0, 120.0]
    """
    return min(SHORTEST * 2 ** min(number, 20), LONGEST)


def find_secrets(words: Iterable[str]) -> list[str]:
    """Return the options that seem to contain a secret, without the secret.

    All users of a machine can read its command lines.

    >>> find_secrets(
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
    >>> find_secrets(
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


def private_folder(name: str) -> Path:
    """Make and return the cache folder of a slice, readable by this user only. Raises Stop."""
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxppo" / "tpu" / name
    )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(
            f"cannot write to {folder} ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder that you can write to"
        ) from None
    return folder


@contextmanager
def lock_slice(name: str) -> Iterator[None]:
    """Allow only one process of this machine to look after a slice. Raises Stop.

    Two processes would undo each other's work.
    """
    lock = private_folder(name) / "lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(
                f"another babysit of {name} is running on this machine; stop it first (Ctrl-C)"
            ) from None
        except OSError as error:
            raise Stop(
                f"cannot lock {lock} ({error.strerror}); "
                "set XDG_CACHE_HOME to a folder on another disk"
            ) from None
        yield


def pack_repository(archive: Path) -> None:
    """Write the tracked files to an archive. Raises Stop.

    Other files, such as keys, must not leave this machine.
    """
    names = tracked_files()
    with tarfile.open(archive, "w:gz") as out:
        for name in names:
            if os.path.lexists(ROOT / name):
                out.add(ROOT / name, arcname=name, recursive=False)


def tracked_files() -> list[str]:
    """Return the names of the repository's tracked files. Raises Stop."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True
        )
    except FileNotFoundError:
        raise Stop(
            "git is missing, which lists the files to copy to the slice; install it"
        ) from None
    if done.returncode:
        raise Stop(f"{ROOT} is not a git checkout: {last_line(done.stderr)}")
    return [name for name in done.stdout.split("\0") if name]
