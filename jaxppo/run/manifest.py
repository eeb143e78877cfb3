"""Seal a folder with a manifest: the size and SHA-256 of every file.

The manifest is written last, so its presence marks the folder as complete. Orbax
notices a missing or short file, but reads a flipped bit silently; the checksums catch
every change.
"""

import hashlib
import json
from pathlib import Path

from jaxppo.data.fetch import sha256
from jaxppo.data.folders import fsync
from jaxppo.run.files import write_atomically

NAME = "manifest.json"
MAX_BYTES = 64 * 2**20  # a larger file is no manifest


class Damaged(Exception):
    """What is wrong with a sealed folder, in a few words."""


def seal(folder: Path, about: dict) -> dict:
    """Write manifest.json (`about` and the checksums of all files), and return it.

    The file appears under its name only once it is fully on disk.
    """
    return _write(
        folder, {**about, "files": {name: _checksum(folder / name) for name in _names(folder)}}
    )


def update(folder: Path, **changes) -> dict:
    """Change entries of a manifest but no checksum, and return it. Raises Damaged."""
    known = {name: x for name, x in read(folder).items() if name != "sha256"}
    return _write(folder, known | changes)


def _write(folder: Path, record: dict) -> dict:
    write_atomically(folder / NAME, _encode(record))
    fsync(folder)
    return record


def read(folder: Path) -> dict:
    """Read the manifest and check it against its own checksum. Raises Damaged."""
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Damaged(f"{NAME} is too large")
        text = path.read_text()
        record = json.loads(text)
        if _encode({name: x for name, x in record.items() if name != "sha256"}) != text:
            raise Damaged(f"{NAME} has been changed")
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    # unreadable, not JSON, or not an object
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise Damaged(f"{NAME} cannot be read ({type(error).__name__})") from None
    return record


def verify(folder: Path) -> dict:
    """Compare every file with the manifest, and return it. Raises Damaged, which names
    the first file that differs.
    """
    record = read(folder)
    found, expected = set(_names(folder)), record["files"]
    for name in sorted(found | set(expected)):
        if name not in found:
            raise Damaged(f"{name} is missing")
        if name not in expected:
            raise Damaged(f"{name} does not belong there")
        try:
            actual = _checksum(folder / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if actual["bytes"] != expected[name]["bytes"]:
            raise Damaged(f"{name} has {actual['bytes']} bytes, not {expected[name]['bytes']}")
        if actual != expected[name]:
            raise Damaged(f"{name} has been changed: its SHA-256 differs")
    return record


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    names = (path.relative_to(folder).as_posix() for path in files)
    return sorted(name for name in names if name not in (NAME, f"{NAME}.tmp"))


def _checksum(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _encode(record: dict) -> str:
    """The one canonical text of a record and its own checksum, so that any changed byte
    is seen.
    """
    body = json.dumps(record, sort_keys=True, indent=1, allow_nan=False)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**record, "sha256": checksum}, sort_keys=True, indent=1) + "\n"
