"""Members of archives are plain files inside the archive."""

import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from jaxppo.data.archives import read_member, read_members
from jaxppo.data.fetch import FetchError


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
    assert read_member(archive, "*/a.txt") == b"A"
    assert read_member(read_member(archive, "*/b.txt"), "*/c.txt") == b"C"


def test_members():
    assert read_members(zipped(**{"b.txt": b"B", "x/a.txt": b"A", "c.png": b""}), "*.txt") == {
        "b.txt": b"B",
        "x/a.txt": b"A",
    }
    assert read_members(tarred("x/a.txt", b"A"), "x/*") == {"x/a.txt": b"A"}
    assert read_members(zipped(a=b""), "*.txt") == {}
    assert read_members(tarred("a.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "*") == {}


@pytest.fixture(scope="module")
def deb(tmp_path_factory) -> Path:
    """A Debian package with one file."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb here")
    folder = tmp_path_factory.mktemp("deb") / "thing"
    (folder / "DEBIAN").mkdir(parents=True, mode=0o755)
    (folder / "DEBIAN" / "control").write_text(
        "Package: thing\nVersion: 1.0\nArchitecture: all\nMaintainer: x\nDescription: y\n"
    )
    (folder / "usr").mkdir()
    (folder / "usr" / "a.txt").write_bytes(b"A")
    path = folder.with_suffix(".deb")
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(folder), str(path)],
        check=True,
        capture_output=True,
    )
    return path


def test_member_of_a_debian_package(deb):
    assert read_member(deb, "./usr/a.txt") == b"A"
    assert read_members(deb, "./usr/*") == {"./usr/a.txt": b"A"}
    assert read_members(deb, "control") == {}


def test_damaged_debian_package(deb, tmp_path, monkeypatch):
    half = tmp_path / "half.deb"
    half.write_bytes(deb.read_bytes()[:-70])
    with pytest.raises(FetchError, match="half.deb cannot be read as an archive") as error:
        read_member(half, "*")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="dpkg-deb is missing: only Debian and Ubuntu have it"):
        read_member(deb, "*")
