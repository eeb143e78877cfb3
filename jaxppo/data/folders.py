"""Write folders that are complete or absent."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxppo.errors import PretrainedError


@contextlib.contextmanager
def complete_folder(place: Path) -> Iterator[Path]:
    """Yield a temporary folder, which gets its name when all of it is on the disk.
    Raises PretrainedError if it cannot be written, or if its place has been taken.
    """
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        folder = temporary / place.name
        folder.mkdir()  # mkdtemp makes a folder that only its owner can read
        yield folder
        for path in [*sorted(folder.rglob("*")), folder]:
            fsync(path)
        os.rename(folder, place)  # replaces an empty folder only
        fsync(place.parent)
    except OSError as error:
        raise PretrainedError(
            f"{place} cannot be written ({error.strerror or error}); give another name or free "
            "space"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
