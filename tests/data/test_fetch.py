"""Downloads are whole, checked and atomic."""

import dataclasses
import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxppo.data import fetch as module
from jaxppo.data.fetch import FetchError, Source, cache_folder, fetch

CONTENT = b"the real file"
SOURCE = Source(
    requirement="thing==1.0",
    filename="thing-1.0.zip",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="MIT",
    megabytes=0.1,
)
# Replaces pip: writes `content` into --dest in two pieces, and fails with `stderr`.
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


DEBIAN = dataclasses.replace(SOURCE, requirement="thing=1.0")
# Replaces apt-get: writes into the working directory, which must be empty.
FAKE_APT = """#!{python}
import os, pathlib, sys, time
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
assert sys.argv[1:] == ["download", "thing=1.0"]
assert os.environ["LC_ALL"] == "C" and os.listdir() == []
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
    """A folder where `content` and `stderr` control the fake pip; it writes its arguments to
    `calls`.
    """
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
    """The folder of either fake, and a source for it."""
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
        (
            "WARNING: x\nERROR: No matching distribution found for thing==1.0",
            "No matching distribution",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n  Expected",
            "another sha256",
        ),
        ("", "ended without the file"),
    ],
)
def test_failure_of_pip_is_one_line(cache, pip, stderr, message):
    assert message in fails(cache, pip, SOURCE, stderr)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("E: Unable to locate package thing", "Unable to locate package thing; run apt-get update"),
        (
            "E: Version '1.0' for 'thing' was not found",
            "run apt-get update as root and try again, or give --data FILE",
        ),
        (
            "E: Failed to fetch http://x/thing.deb  404  Not Found [IP: ::1 80]",
            "run apt-get update",
        ),
        (
            "W: sandbox\nE: Failed to fetch http://x  Could not resolve 'x'\n",
            "Could not resolve 'x'; check the network",
        ),
        ("", "ended without the file"),
    ],
)
def test_failure_of_apt_is_one_line(cache, apt, stderr, message):
    assert message in fails(cache, apt, DEBIAN, stderr)


def test_no_apt(cache, apt):
    (apt / "apt-get").unlink()
    with pytest.raises(
        FetchError,
        match="apt-get is missing: only Debian and Ubuntu have it; give --data FILE instead",
    ):
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


def test_needs_no_jax():
    code = "import jaxppo.data.fetch, sys; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("source", module.SOURCES.values(), ids=module.SOURCES)
def test_sources_are_pinned(source):
    assert len(source.sha256) == 64 and not set(source.sha256) - set("0123456789abcdef")
    name, version = source.requirement.split("==" if source.client == "pip" else "=")
    assert source.filename.replace("_", "-").startswith(f"{name.replace('_', '-')}-{version}")
