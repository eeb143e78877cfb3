"""Read members of a zip, tar or Debian archive, whose hash `fetch` has checked."""

import contextlib
import fnmatch
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, cast

from jaxppo.data.fetch import FetchError, last_error_line, run_debian_tool


def read_member(archive: Path | bytes, pattern: str) -> bytes:
    """Return the bytes of the one member whose name matches a shell pattern."""
    (found,) = read_members(archive, pattern).values()
    return found


def read_members(archive: Path | bytes, pattern: str) -> dict[str, bytes]:
    """Return matching files by name. Raises FetchError where a Debian package cannot be
    read.
    """
    with contextlib.ExitStack() as stack:
        plain = BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb")
        file: IO[bytes] = stack.enter_context(plain)
        if zipfile.is_zipfile(file):
            zipped = stack.enter_context(zipfile.ZipFile(file))
            names = [x.filename for x in zipped.infolist() if not x.is_dir()]
            return {name: zipped.read(name) for name in fnmatch.filter(names, pattern)}
        file.seek(0)
        if isinstance(archive, Path) and file.read(8) == b"!<arch>\n":
            file = stack.enter_context(_deb(archive))
        file.seek(0)
        tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:*"))
        names = [x.name for x in tar.getmembers() if x.isfile()]
        read = lambda name: cast(IO[bytes], tar.extractfile(name)).read()
        return {name: read(name) for name in fnmatch.filter(names, pattern)}


@contextlib.contextmanager
def _deb(path: Path) -> Iterator[IO[bytes]]:
    """Yield the files of a Debian package as a tar archive."""
    with tempfile.TemporaryFile() as tar:
        result = run_debian_tool(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=tar)
        if result.returncode:
            reason = last_error_line(result.stderr.decode(errors="replace"), "dpkg-deb: error:")
            raise FetchError(f"{path.name} cannot be read as an archive ({reason})")
        yield tar
