"""Read single members of a zip, tar or Debian archive, which is never trusted."""

import contextlib
import fnmatch
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO

from jaxppo.data.fetch import FetchError, last_error_line, run_debian_tool


def read_member(archive: Path | bytes, pattern: str, *, limit: int = 2**28) -> bytes:
    """Return the bytes of the one member whose name matches a shell pattern. Raises
    FetchError when not exactly one matches, its name leaves the archive's root, it is
    not a plain file, or it is larger than `limit` bytes.
    """
    found = read_members(archive, pattern, limit=limit)
    if len(found) != 1:
        raise FetchError(f"{_label(archive)} has {len(found)} members named {pattern}, expected 1")
    return next(iter(found.values()))


def read_members(archive: Path | bytes, pattern: str, *, limit: int = 2**28) -> dict[str, bytes]:
    """Return matching members by name, with `limit` on their sum; see `read_member`."""
    found: dict[str, bytes] = {}
    with _opened(archive) as (names, open_member):
        for name in fnmatch.filter(names, pattern):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                raise FetchError(f"{_label(archive)} has a member outside its root ({name!r})")
            with open_member(name) as stream:
                found[name] = stream.read(limit + 1)
            limit -= len(found[name])
            if limit < 0:
                raise FetchError(f"{pattern} in {_label(archive)} is larger than expected")
    return found


@contextlib.contextmanager
def _opened(archive: Path | bytes) -> Iterator[tuple[list[str], Callable[[str], IO[bytes]]]]:
    """Yield the names of the members without folders, and a function that opens one."""
    label = _label(archive)
    try:
        with contextlib.ExitStack() as stack:
            plain = BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb")
            file = stack.enter_context(plain)
            if zipfile.is_zipfile(file):
                opened = stack.enter_context(zipfile.ZipFile(file))
                yield [x.filename for x in opened.infolist() if not x.is_dir()], opened.open
                return
            file.seek(0)
            if isinstance(archive, Path) and file.read(8) == b"!<arch>\n":
                file = stack.enter_context(_deb(archive))
            file.seek(0)
            tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:*"))

            def open_member(name: str) -> IO[bytes]:
                info = tar.getmember(name)
                # a link could point anywhere
                stream = tar.extractfile(info) if info.isfile() else None
                if stream is None:
                    raise FetchError(f"{name} in {label} is not a plain file")
                return stream

            yield [x.name for x in tar.getmembers() if not x.isdir()], open_member
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise FetchError(
            f"{label} cannot be read as an archive ({error}); delete it and try again"
        ) from error


@contextlib.contextmanager
def _deb(path: Path) -> Iterator[IO[bytes]]:
    """Yield the files of a Debian package as a tar archive."""
    with tempfile.TemporaryFile() as tar:
        result = run_debian_tool(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=tar)
        if result.returncode:
            reason = last_error_line(result.stderr.decode(errors="replace"), "dpkg-deb: error:")
            raise tarfile.TarError(reason)
        yield tar


def _label(archive: Path | bytes) -> str:
    return "an inner archive" if isinstance(archive, bytes) else archive.name
