"""Examples from files and hubs, and their split."""

import json
import sys
import types
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.data.examples import (
    Example,
    HubColumns,
    drop_duplicates,
    from_hub,
    load,
    read_examples,
    split_examples,
    split_rows,
)
from jaxppo.errors import UserError


def test_an_example_is_frozen():
    example = Example("Hallo.", "Hello.")
    assert example.extra == {}
    with pytest.raises(TypeError):
        example.extra["letter"] = "A"  # type: ignore[index]
    with pytest.raises(AttributeError):
        example.prompt = ""  # type: ignore[misc]


def test_split_keeps_equal_keys_together():
    rows = [Example(f"p{i}", f"r{i}") for i in range(100)]
    by_prompt = split_examples(rows)
    assert [len(part) for part in by_prompt] == [80, 10, 10]
    assert sorted(chain(*by_prompt)) == sorted(rows)
    pairs = split_examples(rows, [str(i // 2) for i in range(100)], fractions=(0.5, 0.25))
    assert [len(part) for part in pairs] == [
        50,
        26,
        24,
    ]  # pairs: 25 of 50, then on to 75 of 100, and no pair is cut
    for part in pairs:
        numbers = sorted(int(row.prompt[1:]) for row in part)
        assert all(
            b == a + 1 and a % 2 == 0 for a, b in zip(numbers[::2], numbers[1::2], strict=True)
        )


def test_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "1+1", "reference": "2", "level": 3}\n\n'
        '{"reference": "vier", "prompt": "2+2"}\n'
    )
    assert read_examples(path) == [Example("1+1", "2", {"level": 3}), Example("2+2", "vier")]
    assert sorted(chain(*load(str(path)))) == read_examples(path)


def test_only_exact_copies_are_left_out_and_counted(tmp_path, capsys):
    """Case, white space, the reference and other fields tell examples apart."""
    path = tmp_path / "a.jsonl"
    own = [
        {"prompt": "Say a", "reference": "a"},
        {"prompt": "SAY A", "reference": "a"},
        {"prompt": "Say a", "reference": "A"},
        {"prompt": "Say  a", "reference": "a"},
        {"prompt": "Say a", "reference": "a b"},
        {"prompt": "Say a a", "reference": "b"},
        {"prompt": "Say a", "reference": "a", "level": 1},
    ]
    write = lambda rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(own)
    assert len(list(chain(*load(str(path))))) == 7
    assert capsys.readouterr().out == ""
    write([own[0], *own, own[6]])
    found = sorted(x.reference for x in chain(*load(str(path))))
    assert found == ["A", "a", "a", "a", "a", "a b", "b"]
    said = "2 of 9 examples are exact copies of others and were left out\n"
    assert capsys.readouterr().out == said


def test_the_first_copies_stay_in_their_order():
    assert drop_duplicates(["b", "a", "b", "c", "a"], "texts") == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 2: no 'reference' among its keys"),
        ('{"prompt": "a", "reference": 2}', "line 2: 'reference' is int"),
        ('{"prompt": " ", "reference": "b"}', "line 2: 'prompt' is empty"),
        ("prompt", "line 2: not JSON"),
    ],
)
def test_read_names_the_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "reference": "b"}\n' + line)
    with pytest.raises(UserError, match=message):
        read_examples(path)


@pytest.mark.parametrize(
    "data", ["/no/such/file", "./file", "~/no-such-file", "some.jsonl", "folder/some.jsonl.gz"]
)
def test_a_missing_file_is_not_looked_up_on_the_hub(data):
    with pytest.raises(UserError, match=f"there is no file {data}"):
        load(data)


class Rows(list):
    def __init__(self, rows):
        super().__init__(rows)
        self.column_names = list(rows[0]) if rows else ["prompt", "reference"]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`: what its `load_dataset` was asked, and what it gives
    or raises.
    """
    fake = types.SimpleNamespace(
        asked=[], rows=Rows([{"prompt": "a", "reference": "b", "n": 1}]), error=None
    )

    def load_dataset(path, **options):
        fake.asked.append((path, options))
        if fake.error is not None:
            raise fake.error
        return fake.rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return fake


def test_from_hub(hub):
    assert from_hub("someone/sums") == [Example("a", "b", {"n": 1})]
    assert hub.asked == [("someone/sums", {"split": "train", "trust_remote_code": False})]
    assert load("someone/sums").train == [Example("a", "b", {"n": 1})]  # one row: in the first part


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach the hub\nTraceback"),
            "cannot be loaded \\(Couldn't reach the hub\\); check its name",
        ),
        (KeyError(), "cannot be loaded \\(KeyError\\)"),
    ],
)
def test_a_hub_that_cannot_be_reached(hub, error, message):
    hub.error = error
    with pytest.raises(UserError, match=f"'someone/sums' {message}") as raised:
        load("someone/sums")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "reference": "b"}], "no column prompt, only question, reference;"),
        ([{"prompt": "a", "reference": "b"}, {"prompt": "a", "reference": None}], "row 1 of"),
        ([{"prompt": " ", "reference": "b"}], "row 0 of"),
        ([], "no rows in its part train"),
    ],
)
def test_a_data_set_without_prompts_or_references(hub, rows, message):
    hub.rows = Rows(rows)
    with pytest.raises(UserError, match=message):
        from_hub("someone/sums")


def test_a_hubs_own_columns(hub):
    hub.rows = Rows([{"question": "a", "answer": "b"}])
    own = HubColumns(lambda row: Example(row["question"], row["answer"]), configuration="main")
    assert from_hub("someone/sums", own, part="test") == [Example("a", "b")]
    options = {"split": "test", "trust_remote_code": False, "name": "main"}
    assert hub.asked == [("someone/sums", options)]
    hub.rows = Rows([{"question": "a", "reply": "b"}])
    with pytest.raises(UserError, match="no column 'answer', only question, reply"):
        from_hub("someone/sums", own)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets") as raised:
        load("someone/sums")
    assert "\n" not in str(raised.value)


def test_recordings_share_a_prompt_and_are_split_by_reference(tmp_path):
    """An empty prompt is one where there is something to hear."""
    path = tmp_path / "heard.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": "", "reference": f"word {i}", "context": [[0.0]]}) + "\n"
            for i in range(30)
        )
    )
    parts = load(str(path))
    assert all(parts) and sum(map(len, parts)) == 30
    path.write_text('{"prompt": "", "reference": "x"}\n')
    with pytest.raises(UserError, match="line 1: 'prompt' is empty"):
        load(str(path))


@pytest.mark.ci
@given(st.lists(st.text(max_size=3), max_size=60))
def test_split_is_a_partition_without_straddling(keys):
    parts = split_rows(keys)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(keys)))
    train, validation, test = ({keys[row] for row in part} for part in parts)
    assert not train & validation and not train & test and not validation & test


def test_split_sizes():
    parts = split_rows([str(i) for i in range(1000)])
    assert [len(part) for part in parts] == [800, 100, 100]


def test_split_does_not_depend_on_the_order_of_rows():
    keys = [str(i) for i in range(50)]
    forward, backward = split_rows(keys), split_rows(keys[::-1])
    assert [keys[i] for i in forward.test] == [keys[::-1][i] for i in backward.test]


def test_split_is_pinned():
    # a change here would move test sentences into training for everybody
    assert split_rows(list("abcdefghij")).test.tolist() == [4]
