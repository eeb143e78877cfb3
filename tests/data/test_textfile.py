import pytest

from jaxppo.data import textfile
from jaxppo.errors import UserError

TEXT = "ä\u2028b\n\n c\n"  # a line separator of Unicode ends no line


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_text_is_the_same_from_every_editor(tmp_path, mark, end):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + TEXT.replace("\n", end).encode())
    assert textfile.read(path) == TEXT


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"ab\xff", "a.txt is not UTF-8 (byte 3); save it as UTF-8"),
        ("ab".encode("utf-16"), "a.txt is not UTF-8 (byte 1); save it as UTF-8"),
        (b"x" * 11, "a.txt has more than 10 bytes: it is no poem"),
        (None, "a.txt cannot be read (No such file or directory); give a poem"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path, monkeypatch, raw, words):
    monkeypatch.chdir(tmp_path)
    if raw is not None:
        (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(UserError) as caught:
        textfile.read("a.txt", max_bytes=10, what="poem")
    assert str(caught.value) == words


def test_a_pointer_of_git_lfs_is_no_text():
    raw = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"
    with pytest.raises(UserError, match="^a.csv is a pointer of Git LFS.* git lfs pull$"):
        textfile.decode(raw, "a.csv")


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, "\xff"])
def test_a_file_that_holds_no_object(tmp_path, text):
    assert textfile.read_object(tmp_path / "x") == {}
    (tmp_path / "x").write_text(text, "latin-1")
    assert textfile.read_object(tmp_path / "x") == {}
    (tmp_path / "x").write_text('{"a": 1}')
    assert textfile.read_object(tmp_path / "x") == {"a": 1}
