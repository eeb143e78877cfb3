"""JSON lines: every fault gives one line with its number, and no line is held beyond its limit."""

import gzip
import io
import json
import re
import tracemalloc
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.data import jsonl
from jaxppo.errors import UserError


def write(tmp_path, data: bytes, name="x.jsonl"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def refused(path, **options) -> str:
    """Return the message, which is one line of reasonable length."""
    with pytest.raises(UserError) as error:
        list(jsonl.read(path, **options))
    message = str(error.value)
    assert "\n" not in message and len(message) < 400 + len(str(path))
    return message


def test_numbers_of_lines(tmp_path):
    text = '{"a": "zwei ü \\ud83d\\ude42", "b": [1.5, null, -0]}'
    data = f'\ufeff{{"a": 1}}\r\n\n \t\r\n{text}\r\n{{}}'.encode()
    expected = [(1, {"a": 1}), (4, {"a": "zwei ü 🙂", "b": [1.5, None, 0]}), (5, {})]
    assert list(jsonl.read(write(tmp_path, data))) == expected
    assert list(jsonl.read(write(tmp_path, gzip.compress(data), "x.jsonl.gz"))) == expected


NUMBER = "a number that is NaN, infinite, beyond float64 or has over 4300 digits"
BAD = [
    (b'{"a": NaN}', NUMBER),
    (b'{"a": [-Infinity]}', NUMBER),
    (b'{"a": 1e999}', NUMBER),
    (b'{"a": -1' + b"0" * 5000 + b".5}", NUMBER),
    (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    (b'{"a": {"\\uDC00x": 1}}', "half of a surrogate pair"),
    # both halves, but the wrong way round
    (b'{"a": "\\ude42\\ud83d"}', "half of a surrogate pair"),
    (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),  # a surrogate in bytes
    (b'{"a": "\xff"}', "not UTF-8"),
    ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b'{"a": ' + b"1" * 4301 + b"}", NUMBER),
    (b'{"a": -' + b"1" * 4301 + b"}", NUMBER),
    (b'\xef\xbb\xbf{"a": 1}', "BOM"),  # a mark in the middle of a file is not skipped
    (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' twice"),
    (b'{"x": [{"a": 1, "a": 1}]}', "the key 'a' twice"),
    (b'{"' + b"k" * 9999 + b'": 1, "' + b"k" * 9999 + b'": 1}', "twice in one object"),
    (b'{"a": 1', "not JSON .Expecting ',' delimiter at column 8."),
    (b'{"a": 1} {"a": 2}', "not JSON .Extra data at column 10."),
    (b"{'a': 1}", "not JSON"),
    (b'{"a": "tab\there"}', "not JSON .Invalid control character"),
    (b"\xc2\xa0", "not JSON"),  # a no-break space is not white space of JSON
    (b"\0", "not JSON"),
    (b"[1]", "list, not an object; write"),
    (b"null", "NoneType, not an object"),
    (b'"text"', "str, not an object"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_lines(tmp_path, line, message):
    path = write(tmp_path, b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    found = refused(path)
    assert found.startswith(f"{path}, line 3: ")
    assert re.search(message, found)
    with pytest.warns(UserWarning, match=r"skipped 1 bad line; the first is line 3: ") as caught:
        assert list(jsonl.read(path, errors="skip")) == [(1, {"a": 1}), (4, {"a": 2})]
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"b": 1}', "no 'a' among its keys ('b')"),
        (b"{}", "no 'a' among its keys (none)"),
        (
            b'{"p": 1, "q": 1, "r": 1, "s": 1, "t": 1, "u": 1}',
            "no 'a' among its keys ('p', 'q', 'r', 's', 't', ...)",
        ),
        (b'{"a": null}', "'a' is NoneType, not a string"),
        (b'{"a": ["x"]}', "'a' is list, not a string"),
        (b'{"a": " \\n"}', "'a' is empty"),
    ],
)
def test_required_keys(tmp_path, line, message):
    path = write(tmp_path, b'{"a": "x"}\n' + line)
    assert refused(path, strings=("a",)) == f"{path}, line 2: {message}"
    with pytest.warns(UserWarning, match="skipped 1 bad line"):
        assert list(jsonl.read(path, strings=("a",), errors="skip")) == [(1, {"a": "x"})]


def test_numbers_at_the_limit(tmp_path):
    path = write(tmp_path, b'{"a": ' + b"9" * 4300 + b', "b": -1.7976931348623157e308}')
    [(_, row)] = jsonl.read(path)
    assert row == {"a": 10**4300 - 1, "b": -1.7976931348623157e308}


def test_skipping_has_a_limit(tmp_path):
    path = write(tmp_path, b'{"a": 1}\n' + b"bad\n" * 3 + b'{"a": 5}\n')
    with pytest.warns(UserWarning, match="skipped 3 bad lines; the first is line 2: not JSON"):
        assert [number for number, _ in jsonl.read(path, errors="skip", max_bad=3)] == [1, 5]
    assert "line 4: not JSON" in refused(path, errors="skip", max_bad=2)
    assert refused(path, errors="skip", max_bad=2).endswith(
        "that is bad line 3, and 2 may be skipped"
    )
    assert "line 2" in refused(path, errors="skip", max_bad=0)


def test_a_good_file_gives_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(jsonl.read(write(tmp_path, b"{}\n{}"), errors="skip"))) == 2


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_length_of_a_line(tmp_path, ending):
    # {"a":"xx"} has 10 bytes
    path = write(tmp_path, b'{}\n{"a":"xx"}' + ending)
    assert list(jsonl.read(path, max_line=10)) == [(1, {}), (2, {"a": "xx"})]
    assert "line 2: longer than 9 bytes" in refused(path, max_line=9)


def test_a_long_line_is_skipped_whole(tmp_path):
    # what is left of a long line is not taken for a line: its rest would be the object {"b":1}
    path = write(tmp_path, b" " * 10 + b'{"b":1}\n{"c":1}\n')
    with pytest.warns(UserWarning, match="line 1: longer than 9 bytes"):
        assert list(jsonl.read(path, max_line=9, errors="skip")) == [(2, {"c": 1})]
    # nor is its beginning, with the byte order mark taken away: 3 + 2 + 4 = 9 bytes, 8 allowed
    path = write(tmp_path, b"\xef\xbb\xbf{}    x\n{}\n")
    assert "line 1: longer than 8 bytes" in refused(path, max_line=8)


def test_long_lines_are_never_held(tmp_path):
    path = write(tmp_path, b'{"a": "' + b"x" * 2**24 + b'"}\n{}\n')
    zipped = write(tmp_path, gzip.compress(path.read_bytes()), "x.jsonl.gz")
    for file in (path, zipped):
        tracemalloc.start()
        with pytest.warns(UserWarning, match="line 1: longer than 1024 bytes"):
            assert list(jsonl.read(file, errors="skip", max_line=1024)) == [(2, {})]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20  # of 16 MiB; the buffers of gzip take some 200 KiB


def test_size_of_the_file(tmp_path):
    path = write(tmp_path, b"{}\n{}\n{}\n")  # 9 bytes
    assert len(list(jsonl.read(path, max_bytes=9))) == 3
    assert "line 3: more than 8 bytes so far" in refused(path, max_bytes=8)
    assert "line 3: more than 8 bytes so far" in refused(path, max_bytes=8, errors="skip")


@pytest.mark.ci
def test_a_bomb_is_not_unpacked(tmp_path):
    # 64 MiB of blank lines, or one line of 64 MiB, in about 64 KiB; the reader stops after 1 MiB
    for inside in (b"\n" * 2**26, b"x" * 2**26):
        path = write(tmp_path, gzip.compress(inside), "x.jsonl.gz")
        assert path.stat().st_size < 2**17
        assert "more than 1048576 bytes so far" in refused(
            path, max_bytes=2**20, errors="skip", max_line=1000
        )


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(b"".join(json.dumps({"a": i}).encode() + b"\n" for i in range(1000)))
    for cut in (1, 5, 12, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        assert "not a whole gzip file" in refused(write(tmp_path, whole[:cut], "x.jsonl.gz"))
    for i in (0, 2, len(whole) // 2, len(whole) - 5):  # magic, method, body, checksum
        data = whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :]
        assert "not a whole gzip file" in refused(
            write(tmp_path, data, "x.jsonl.gz"), errors="skip", max_bad=10**6
        )
    # after a header of 10 bytes, a block of the kind 3, which does not exist
    block = whole[:10] + b"\xff" + whole[11:]
    assert "not a whole gzip file (Error -3" in refused(write(tmp_path, block, "x.jsonl.gz"))
    assert "not a whole gzip file" in refused(write(tmp_path, b'{"a": 1}\n', "x.jsonl.gz"))
    assert "not UTF-8" in refused(write(tmp_path, whole))  # gzip without its suffix


def test_files_without_objects(tmp_path):
    for data in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        assert refused(write(tmp_path, data)).endswith(
            'has no objects; give one JSON object a line, such as {"key": "value"}'
        )
    assert 'such as {"q": "...", "a": "..."}' in refused(write(tmp_path, b""), strings=("q", "a"))
    assert "no objects among its lines (1 bad; line 1: list, not an object" in refused(
        write(tmp_path, b"[]"), errors="skip"
    )
    assert "no objects" in refused(write(tmp_path, gzip.compress(b""), "x.jsonl.gz"))


def test_files_that_cannot_be_read(tmp_path):
    for name in ("nothing.jsonl", "nothing.jsonl.gz"):
        assert "No such file" in refused(tmp_path / name)
    (tmp_path / "folder.gz").mkdir()
    for folder in (tmp_path, tmp_path / "folder.gz"):
        assert "directory" in refused(folder)
    assert "errors='ignore'" in refused(tmp_path, errors="ignore")


def test_lines_are_read_one_at_a_time(tmp_path):
    rows = jsonl.read(write(tmp_path, b'{"a": 1}\nbad\n'))
    assert next(rows) == (1, {"a": 1})  # before the bad line is met
    with pytest.raises(UserError, match="line 2"):
        next(rows)


def test_a_file_is_closed_when_the_reader_stops(tmp_path, monkeypatch):
    opened = []
    real = io.open
    monkeypatch.setattr(io, "open", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    rows = jsonl.read(write(tmp_path, b"{}\n" * 9))
    opened.clear()
    next(rows)
    assert [file.closed for file in opened] == [False]
    rows.close()
    assert [file.closed for file in opened] == [True]


TREE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    rows=st.lists(st.dictionaries(st.text(), TREE, max_size=4), min_size=1, max_size=5),
    plain=st.booleans(),
)
def test_what_json_writes_is_read_back(tmp_path_factory, rows, plain):
    data = "\n".join(json.dumps(row, ensure_ascii=plain) for row in rows).encode()
    path = write(tmp_path_factory.mktemp("x"), data)
    assert [row for _, row in jsonl.read(path)] == rows


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_files_of_any_editor(tmp_path, end):
    text = end.join([b'\xef\xbb\xbf{"a": "\xc3\xa4"}', b"", b'{"a": 2}', b""])
    assert list(jsonl.read(write(tmp_path, text))) == [(1, {"a": "ä"}), (3, {"a": 2})]
    assert "line 4: not JSON" in refused(write(tmp_path, text + b"{"))


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = write(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
    assert refused(path).startswith(f"{path}, line 1: the file is a pointer of Git LFS")
