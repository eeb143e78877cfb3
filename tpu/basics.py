"""Errors, pauses, and what of the repository goes to a slice."""

import os
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORTEST, LONGEST = 10.0, 120.0  # seconds between two attempts, or two looks


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


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"])[-1][:300]


def pack(archive: Path) -> None:
    """Tracked files only: nothing that lies about by chance, such as a key, leaves this machine. Raises Stop."""
    with tarfile.open(archive, "w:gz") as out:
        for name in tracked():
            if os.path.lexists(ROOT / name):
                out.add(ROOT / name, arcname=name, recursive=False)


def tracked() -> list[str]:
    """The repository's tracked files. Raises Stop."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if done.returncode:
        raise Stop(f"{ROOT} is no git checkout: {last_line(done.stderr)}")
    return [name for name in done.stdout.split("\0") if name]
