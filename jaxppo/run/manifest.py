"""A seal on a folder of files: their SHA-256, and what the folder holds. Written last,
it marks the folder as complete.

Orbax notices a file that is short or missing, but reads a flipped bit without a word;
nothing gets past the sums.
"""

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"
MOST = 64 * 2**20  # bytes of a manifest; more is none


class Damaged(Exception):
    """What is wrong with a sealed folder, in a few words."""


def seal(folder: Path, about: dict) -> dict:
    """Write manifest.json: `about` (JSON values), and the size and sum of every other
    file under the folder. Returns it.

    The name appears only when the whole manifest is on the disk.
    """
    return _write(
        folder, {**about, "files": {name: _sum(folder / name) for name in _names(folder)}}
    )


def amend(folder: Path, **changes) -> dict:
    """Change some of what a manifest says, and none of its sums: what was damaged stays
    so. Returns it. Raises Damaged when it is so itself.
    """
    known = {name: x for name, x in read(folder).items() if name != "sha256"}
    return _write(folder, known | changes)


def _write(folder: Path, record: dict) -> dict:
    text = _text(record)
    temporary = folder / f"{NAME}.tmp"
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)
    sync(folder)
    return record


def read(folder: Path) -> dict:
    """The manifest alone, whole and unchanged. Raises Damaged."""
    path = folder / NAME
    try:
        if path.stat().st_size > MOST:
            raise Damaged(f"{NAME} is too large")
        text = path.read_text()
        record = json.loads(text)
        if _text({name: x for name, x in record.items() if name != "sha256"}) != text:
            raise Damaged(f"{NAME} has been changed")
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (
        OSError,
        ValueError,
        RecursionError,
        AttributeError,
    ) as error:  # gone, not JSON, not an object
        raise Damaged(f"{NAME} cannot be read ({type(error).__name__})") from None
    return record


def verify(folder: Path) -> dict:
    """The manifest, after every file has been read and compared. Raises Damaged, which
    names the first that differs.
    """
    record = read(folder)
    there, expected = set(_names(folder)), record["files"]
    for name in sorted(there | set(expected)):
        if name not in there:
            raise Damaged(f"{name} is missing")
        if name not in expected:
            raise Damaged(f"{name} does not belong there")
        try:
            found = _sum(folder / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if found["bytes"] != expected[name]["bytes"]:
            raise Damaged(f"{name} has {found['bytes']} bytes, not {expected[name]['bytes']}")
        if found != expected[name]:
            raise Damaged(f"{name} has been changed: its SHA-256 differs")
    return record


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(
        name
        for path in files
        if (name := path.relative_to(folder).as_posix()) not in (NAME, f"{NAME}.tmp")
    )


def _sum(path: Path) -> dict:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _text(record: dict) -> str:
    """The one way in which a record is written, with its own sum: another byte anywhere
    is seen.
    """
    body = json.dumps(record, sort_keys=True, indent=1, allow_nan=False)
    return (
        json.dumps(
            {**record, "sha256": hashlib.sha256(body.encode()).hexdigest()},
            sort_keys=True,
            indent=1,
        )
        + "\n"
    )
