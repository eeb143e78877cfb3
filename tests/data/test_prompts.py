"""Prompts from files to padded ids, in an order that a resumed run repeats."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.data import prompts
from jaxppo.errors import UserError


class Letters:
    """One id a letter: a = 1, b = 2, ...; 0 pads."""

    pad_id = 0
    vocab_size = 27

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 96 for c in text]


def write(tmp_path, data: bytes):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(data)
    return path


def test_read_jsonl(tmp_path):
    path = write(tmp_path, '\ufeff{"prompt": "one"}\r\n\n{"prompt": "zwei ü", "x": 1}'.encode())
    assert prompts.read_jsonl(path) == [("one", None), ("zwei ü", None)]
    path = write(tmp_path, b'{"q": "one", "a": "1"}\n')
    assert prompts.read_jsonl(path, "q", "a") == [prompts.Record("one", "1")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "x"', "not JSON"),
        (b"[1]", "list, not an object"),
        (b'{"text": "x"}', "no 'prompt' among its keys .'text'."),
        (b"{}", "none"),
        (b'{"prompt": 3}', "is int, not a string"),
        (b'{"prompt": " "}', "is empty"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "x", "prompt": "y"}', "twice"),
    ],
)
def test_read_jsonl_names_the_line(tmp_path, line, message):
    path = write(tmp_path, b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as error:
        prompts.read_jsonl(path)
    assert "line 3" in str(error.value) and "\n" not in str(error.value)


def test_read_jsonl_missing_reference(tmp_path):
    with pytest.raises(UserError, match="line 1: no 'answer'"):
        prompts.read_jsonl(write(tmp_path, b'{"prompt": "x"}'), reference="answer")


def test_read_jsonl_passes_over_bad_lines(tmp_path):
    path = write(
        tmp_path,
        b'{"prompt": "one", "a": "1"}\nbad\n{"prompt": "two"}\n{"prompt": "three", "a": "3"}\n',
    )
    with pytest.warns(UserWarning, match="skipped 2 bad lines; the first is line 2: not JSON"):
        assert prompts.read_jsonl(path, reference="a", errors="skip") == [
            ("one", "1"),
            ("three", "3"),
        ]
    with pytest.raises(
        UserError, match="line 3: no 'a' .*; that is bad line 2, and 1 may be skipped"
    ):
        prompts.read_jsonl(path, reference="a", errors="skip", max_bad=1)


def test_read_jsonl_without_prompts(tmp_path):
    with pytest.raises(
        UserError, match=r'no objects; give one JSON object a line, such as {"prompt": "..."}'
    ):
        prompts.read_jsonl(write(tmp_path, b"\n \n"))
    with pytest.raises(UserError, match="No such file"):
        prompts.read_jsonl(tmp_path / "nothing")
    with pytest.raises(UserError, match="directory"):
        prompts.read_jsonl(tmp_path)


def test_encode_pads_left():
    tokens, mask, rows, dropped = prompts.encode_rows(["abc", "b"], Letters(), 3)
    assert tokens.tolist() == [[1, 2, 3], [0, 0, 2]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert rows.tolist() == [0, 1] and dropped == 0
    assert tokens.dtype == np.int32 and mask.dtype == bool


def test_encode_too_long():
    texts = ["abcd", "b", "abc"]
    assert prompts.encode_rows(texts, Letters(), 3).rows.tolist() == [1, 2]
    assert prompts.encode_rows(texts, Letters(), 3).dropped == 1
    assert prompts.encode_rows(texts, Letters(), 2, too_long="first").tokens.tolist() == [
        [1, 2],
        [0, 2],
        [1, 2],
    ]
    assert prompts.encode_rows(texts, Letters(), 2, too_long="last").tokens.tolist() == [
        [3, 4],
        [0, 2],
        [2, 3],
    ]
    # the start token takes one place and is never cut off
    assert prompts.encode_rows(texts, Letters(), 3, too_long="last", start=9).tokens.tolist() == [
        [9, 3, 4],
        [0, 9, 2],
        [9, 2, 3],
    ]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a", ""], {}, "prompt 1 has no tokens"),
        (["a", "{"], {}, "prompt 1 has the token id 27, outside the model's vocabulary of 27"),
        (
            ["a"],
            {"vocab_size": 26},
            "the tokenizer has 27 ids, more than the model's vocabulary of 26",
        ),
        (["abcd", "abcde"], {"too_long": "error"}, "prompt 1 has 5 tokens, but 4 fit"),
        (["abcd"], {"too_long": "error", "start": 5}, "prompt 0 has 4 tokens, but 3 fit"),
        (["a", "A"], {}, "prompt 1 has the token id -31"),
        (["abc", "abcd"], {"length": 2}, "none of 2 prompts fits in 2 tokens; the longest has 4"),
        ([], {}, "none of 0 prompts"),
        (["a"], {"length": 1, "start": 5}, "use at least 2"),
    ],
)
def test_encode_errors(texts, options, message):
    with pytest.raises(UserError, match=message):
        prompts.encode_rows(texts, Letters(), **({"length": 4} | options))


@pytest.mark.parametrize("pad", [27, -1])
def test_encode_checks_the_padding_id(pad):
    tokenizer = Letters()
    tokenizer.pad_id = pad
    with pytest.raises(
        UserError, match=f"padding id {pad} is outside the model's vocabulary of 27"
    ):
        prompts.encode_rows(["abcd"], tokenizer, 4)  # although no prompt here is padded


def test_encode_for_a_model_with_more_ids():
    # models round their vocabulary up, and then an id beyond the tokenizer's own is the model's
    assert prompts.encode_rows(
        ["a{"], Letters(), 2, vocab_size=32, too_long="error"
    ).tokens.tolist() == [[1, 27]]


@given(st.integers(0, 2**63), st.integers(0, 1000), st.integers(1, 200))
def test_order_is_a_permutation(seed, epoch, n):
    assert sorted(prompts.order(seed, epoch, n)) == list(range(n))


def test_order_depends_on_seed_and_epoch():
    base = prompts.order(0, 0, 100)
    assert (base == prompts.order(0, 0, 100)).all()
    assert (base != prompts.order(0, 1, 100)).any() and (base != prompts.order(1, 0, 100)).any()
    # pinned: a resumed run must meet the same order years later
    assert prompts.order(0, 0, 5).tolist() == [3, 2, 1, 0, 4]


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 100))
def test_batches_are_one_stream(n, batch_size, cursor):
    # any batch is a window on the epochs written one after another
    epochs = (cursor + batch_size) // n + 1
    stream = np.concatenate([prompts.order(7, epoch, n) for epoch in range(epochs)])
    taken = prompts.indices(n, cursor=cursor, batch_size=batch_size, seed=7)
    assert taken.tolist() == stream[cursor : cursor + batch_size].tolist()


def test_batch_takes_rows():
    encoded = prompts.encode_rows(list("abcdefg"), Letters(), 2)
    batch = prompts.batch(encoded.tokens, encoded.mask, cursor=5, batch_size=4, seed=0)
    assert batch.tokens[:, 1].tolist() == [row + 1 for row in batch.rows]
    assert batch.mask.tolist() == [[False, True]] * 4


def test_batch_from_nothing():
    with pytest.raises(UserError, match="0 prompts"):
        prompts.indices(0, cursor=0, batch_size=1, seed=0)


def test_custom_file_end_to_end(tmp_path):
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "abc", "abcdef"))
    texts = [record.prompt for record in prompts.read_jsonl(write(tmp_path, lines.encode()))]
    assert prompts.encode_rows(texts, Letters(), 4).tokens.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
