"""Single members of a zip, tar or Debian archive, read within bounds: what an archive
says of itself is not trusted.
"""

import contextlib
import fnmatch
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO

from jaxppo.data.fetch import FetchError, debian, last_line


def member(archive: Path | bytes, pattern: str, *, limit: int = 2**28) -> bytes:
    """The bytes of the one member of a zip, tar or Debian archive whose name matches a
    shell pattern.

    Raises:
        FetchError: when no member or several match, when the name leaves the archive's
        root, when it is no plain file,
            or when it is larger than `limit` bytes.
    """
    with _opened(archive) as (names, stream_of):
        return _bounded(
            stream_of(_one(names, pattern, _label(archive))),
            limit,
            f"{pattern} in {_label(archive)}",
        )


def members(archive: Path | bytes, pattern: str, *, limit: int = 2**28) -> dict[str, bytes]:
    """The bytes of every member whose name matches a shell pattern, by name; `limit`
    bounds them all together.

    Raises:
        FetchError: as for `member`, but for their number.
    """
    found: dict[str, bytes] = {}
    with _opened(archive) as (names, stream_of):
        for name in _matching(names, pattern, _label(archive)):
            found[name] = _bounded(stream_of(name), limit, f"{pattern} in {_label(archive)}")
            limit -= len(found[name])
    return found


def extract(archive: Path | bytes, pattern: str, folder: Path, *, limit: int = 2**33) -> Path:
    """Write one member, found as by `member`, into a folder under its last name,
    whatever path the archive gives.
    """
    with _opened(archive) as (names, stream_of):
        name = _one(names, pattern, _label(archive))
        target = folder / PurePosixPath(name).name
        with stream_of(name) as stream, target.open("wb") as file:
            while piece := stream.read(2**20):
                limit -= len(piece)
                if limit < 0:
                    raise FetchError(
                        f"{name} in {_label(archive)} is larger than it should be; it was not read on"
                    )
                file.write(piece)
    return target


@contextlib.contextmanager
def _opened(archive: Path | bytes) -> Iterator[tuple[list[str], Callable[[str], IO[bytes]]]]:
    """The names of the members but for folders, and what opens one of them."""
    label = _label(archive)
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(
                BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb")
            )
            if zipfile.is_zipfile(file):
                opened = stack.enter_context(zipfile.ZipFile(file))
                yield (
                    [info.filename for info in opened.infolist() if not info.is_dir()],
                    opened.open,
                )
                return
            file.seek(0)
            if isinstance(archive, Path) and file.read(8) == b"!<arch>\n":
                file = stack.enter_context(_deb(archive))
            file.seek(0)
            tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:*"))
            yield (
                [info.name for info in tar.getmembers() if not info.isdir()],
                lambda name: _plain(tar, name, label),
            )
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise FetchError(
            f"{label} cannot be read as an archive ({error}); delete it and try again"
        ) from error


@contextlib.contextmanager
def _deb(path: Path) -> Iterator[IO[bytes]]:
    """The files of a Debian package as a tar archive, in a temporary file."""
    with tempfile.TemporaryFile() as tar:
        result = debian(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=tar)
        if result.returncode:
            reason = last_line(result.stderr.decode(errors="replace"), "dpkg-deb: error:")
            raise FetchError(
                f"{path.name} cannot be read as an archive ({reason}); delete it and try again"
            )
        yield tar


def _plain(tar: tarfile.TarFile, name: str, label: str) -> IO[bytes]:
    info = tar.getmember(name)
    # a link could point anywhere
    stream = tar.extractfile(info) if info.isfile() else None
    if stream is None:
        raise FetchError(f"{name} in {label} is not a plain file; it was not read")
    return stream


def _bounded(stream: IO[bytes], limit: int, what: str) -> bytes:
    with stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise FetchError(f"{what} is larger than {limit} bytes; it was not read")
    return data


def _one(names: list[str], pattern: str, label: str) -> str:
    matches = _matching(names, pattern, label)
    if len(matches) != 1:
        raise FetchError(
            f"{label} has {len(matches)} members named {pattern}, expected 1; it was not read"
        )
    return matches[0]


def _matching(names: list[str], pattern: str, label: str) -> list[str]:
    """The names that match, none of which may lead out of the archive."""
    matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    for name in matches:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise FetchError(f"{label} names a member outside itself ({name!r}); it was not read")
    return matches


def _label(archive: Path | bytes) -> str:
    return "an inner archive" if isinstance(archive, bytes) else archive.name
