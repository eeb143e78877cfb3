import json
import random

import pytest

from jaxppo.run import manifest
from jaxppo.run.manifest import Damaged


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "a").write_bytes(bytes(range(256)))
    (tmp_path / "state" / "b").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    return tmp_path


def test_seal_and_verify(folder):
    record = manifest.seal(folder, {"step": 3, "score": None})
    # sha256 of "abc" is in FIPS 180-2, appendix B.1
    want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert record["files"]["state/b"] == {"bytes": 3, "sha256": want}
    assert sorted(record["files"]) == ["empty", "state/b", "state/d/a"]
    found = manifest.verify(folder)
    assert (found["step"], found["score"], found["files"]) == (3, None, record["files"])
    assert not (folder / "manifest.json.tmp").exists()
    assert json.loads((folder / "manifest.json").read_text())["step"] == 3
    manifest.seal(folder, {"step": 4})  # again, over itself
    assert manifest.verify(folder)["step"] == 4


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: (f / "state" / "b").write_bytes(b"abd"),
            "state/b has been changed: its SHA-256 differs",
        ),
        (lambda f: (f / "state" / "b").write_bytes(b"ab"), "state/b has 2 bytes, not 3"),
        (lambda f: (f / "state" / "b").unlink(), "state/b is missing"),
        (lambda f: (f / "state" / "c").touch(), "state/c does not belong there"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text(""), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json has been changed"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest.json cannot be read"),
    ],
)
def test_damage_has_a_name(folder, damage, words):
    manifest.seal(folder, {"step": 3})
    damage(folder)
    with pytest.raises(Damaged, match=words):
        manifest.verify(folder)


def test_every_flipped_bit_of_the_manifest_is_seen(folder):
    manifest.seal(folder, {"step": 3, "score": 0.25})
    path = folder / "manifest.json"
    good = path.read_bytes()
    for place in random.Random(0).sample(range(8 * len(good)), 300):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(Damaged):
            manifest.verify(folder)
    path.write_bytes(good)
    manifest.verify(folder)


def test_a_link_out_of_the_folder_is_no_file_of_it(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    manifest.seal(folder, {})
    (folder / "state" / "link").symlink_to(other)
    with pytest.raises(Damaged, match="state/link does not belong there"):
        manifest.verify(folder)


def test_a_manifest_beyond_all_measure_is_not_read(folder, monkeypatch):
    manifest.seal(folder, {})
    monkeypatch.setattr(manifest, "MAX_BYTES", 10)
    with pytest.raises(Damaged, match="too large"):
        manifest.read(folder)


def test_a_number_that_is_none_is_refused(folder):
    with pytest.raises(ValueError):
        manifest.seal(folder, {"score": float("nan")})


def test_what_is_amended_keeps_its_sums(tmp_path):
    """A file that was damaged before stays so: the sums are not made anew."""
    (tmp_path / "data").write_bytes(b"1234")
    sealed = manifest.seal(tmp_path, {"step": 3, "score": None})
    assert manifest.update(tmp_path, score=0.5)["files"] == sealed["files"]
    assert manifest.verify(tmp_path)["score"] == 0.5 and manifest.read(tmp_path)["step"] == 3
    (tmp_path / "data").write_bytes(b"1235")
    manifest.update(tmp_path, score=0.7)
    with pytest.raises(manifest.Damaged):
        manifest.verify(tmp_path)
