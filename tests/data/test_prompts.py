"""Prompts are encoded, padded on the left, and drawn in an order that a resumed run repeats."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.config import RunConfig
from jaxppo.data import prompts
from jaxppo.errors import UserError

CONFIG = RunConfig(batch_size=4, group_size=1)


class Letters:
    """One id a letter: a = 1, b = 2, ...; 0 pads."""

    pad_id = 0
    start_id = 26
    vocab_size = 27

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 96 for c in text]


def encode(texts, length=4, **options) -> prompts.PromptSet:
    return prompts.encode(texts, Letters(), length, **options)


def test_encode_pads_left():
    found = encode(["abc", "b"], 3)
    assert found.tokens.tolist() == [[1, 2, 3], [0, 0, 2]]
    assert found.mask.tolist() == [[True, True, True], [False, False, True]]
    assert found.tokens.dtype == np.int32 and found.mask.dtype == bool


def test_prompts_that_are_too_long_are_left_out_and_counted(capsys):
    found = encode(["abcd", "b", "abc"], 3, extra={"row": np.arange(3)})
    assert found.tokens.tolist() == [[0, 0, 2], [1, 2, 3]] and found.extra["row"].tolist() == [1, 2]
    assert capsys.readouterr().out == "1 of 3 prompts are longer than 3 tokens and were left out\n"
    encode(["b", "abc"], 3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"length": 2, "too_long": "first"}, [[1, 2], [0, 2], [1, 2]]),
        ({"length": 2, "too_long": "last"}, [[3, 4], [0, 2], [2, 3]]),
        # the start token takes one place and is never cut off
        ({"length": 3, "too_long": "last", "start": 9}, [[9, 3, 4], [0, 9, 2], [9, 2, 3]]),
    ],
)
def test_prompts_that_are_too_long_are_cut(options, tokens):
    assert encode(["abcd", "b", "abc"], **options).tokens.tolist() == tokens


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a", ""], {}, "prompt 1 has no tokens"),
        (["a"], {"too_long": "left"}, "too_long 'left': choose one of drop, first, last, error"),
        (["a", "{"], {}, "prompt 1 has the token id 27, outside the vocabulary of 27"),
        (["a", "A"], {}, "prompt 1 has the token id -31"),
        (["abcde", "a", "{"], {}, "prompt 2 has the token id 27"),  # the first is left out
        (["a"], {"start": 27}, "prompt 0 has the token id 27"),
        (["abcd", "abcde"], {"too_long": "error"}, "prompt 1 has 5 tokens, but 4 fit"),
        (["abcd"], {"too_long": "error", "start": 5}, "prompt 0 has 4 tokens, but 3 fit"),
        (["abc", "abcd"], {"length": 2}, "none of 2 prompts fits in 2 tokens; the longest has 4"),
        ([], {}, "none of 0 prompts"),
        (["a"], {"length": 1, "start": 5}, "use at least 2"),
    ],
)
def test_encode_errors(texts, options, message):
    with pytest.raises(UserError, match=message):
        encode(texts, **options)


@pytest.mark.parametrize("pad", [27, -1])
def test_encode_checks_the_padding_id(pad):
    tokenizer = Letters()
    tokenizer.pad_id = pad
    with pytest.raises(UserError, match=f"padding id {pad} is outside the vocabulary of 27"):
        prompts.encode(["abcd"], tokenizer, 4)  # although no prompt here is padded


@given(st.integers(0, 2**63), st.integers(0, 1000), st.integers(1, 200))
def test_order_is_a_permutation(seed, epoch, n):
    assert sorted(prompts.epoch_order(seed, epoch, n)) == list(range(n))


def test_order_depends_on_seed_and_epoch():
    first = prompts.epoch_order(0, 0, 100)
    assert (first == prompts.epoch_order(0, 0, 100)).all()
    assert (first != prompts.epoch_order(0, 1, 100)).any()
    assert (first != prompts.epoch_order(1, 0, 100)).any()
    # pinned: a resumed run must meet the same order years later
    assert prompts.epoch_order(0, 0, 5).tolist() == [3, 2, 1, 0, 4]


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 100))
def test_batches_are_one_stream(n, batch_size, cursor):
    # any batch is a window on the epochs written one after another
    epochs = (cursor + batch_size) // n + 1
    stream = np.concatenate([prompts.epoch_order(7, epoch, n) for epoch in range(epochs)])
    taken = prompts.batch_indices(n, cursor=cursor, batch_size=batch_size, seed=7)
    assert taken.tolist() == stream[cursor : cursor + batch_size].tolist()


def test_batch_from_nothing():
    with pytest.raises(UserError, match="0 prompts"):
        prompts.batch_indices(0, cursor=0, batch_size=1, seed=0)


def test_batches_are_a_function_of_seed_and_cursor():
    seven = encode(list("abcdefg"), 2)
    one, same, next_one = (seven.batch(CONFIG, cursor) for cursor in (0, 0, 4))
    toys.assert_same(one, same)
    assert (one.tokens != next_one.tokens).any()
    assert (seven.batch(replace(CONFIG, seed=1), 0).tokens != one.tokens).any()
    assert one.index.tolist() == [0, 1, 2, 3]
    together = np.concatenate([seven.batch(CONFIG, cursor).tokens for cursor in range(0, 28, 4)])
    found = np.unique(together, axis=0, return_counts=True)
    assert found[1].tolist() == [4] * 7  # 28 rows are 4 epochs of 7 prompts


def test_batch_takes_rows_with_what_belongs_to_them():
    some = encode(["ab", "abcdefg", "cd", "ef"], extra={"first": np.array([1, 1, 3, 5])})
    batch = some.batch(replace(CONFIG, group_size=2), 0)
    assert batch.tokens[:, 2].tolist() == batch.extra["first"].tolist()
    assert batch.mask.tolist() == [[False, False, True, True]] * 4


def test_copies_of_a_prompt_are_neighbours():
    seven = encode(list("abcdefg"), 2)
    batch = seven.batch(replace(CONFIG, batch_size=8, group_size=4), 0)
    assert batch.tokens.shape == (8, 2)
    single = seven.batch(replace(CONFIG, batch_size=2), 0)
    np.testing.assert_array_equal(batch.tokens, single.tokens.repeat(4, 0))
    assert batch.index.tolist() == list(range(8))  # each copy has noise of its own


def test_several_batches_of_one_call():
    seven = encode(list("abcdefg"), 2, extra={"row": np.arange(7)})
    config = replace(CONFIG, steps_per_call=3, group_size=2)
    stacked = seven.batches(config, 2)
    assert isinstance(stacked.tokens, np.ndarray)  # the step puts them on its devices
    assert stacked.extra["row"].shape == (3, 4)
    for k in range(3):
        want = seven.batch(config, 2 + 2 * k)  # two prompts a step
        toys.assert_same(jax.tree.map(lambda x: x[k], stacked), want)
    toys.assert_same(seven.batches(CONFIG, 2), seven.batch(CONFIG, 2))


def test_prompts_are_formatted_as_in_training():
    two = replace(CONFIG, prompt_format="{prompt}: {aspect}")
    fields = {"prompt": "a", "aspect": "{prompt}"}
    assert prompts.format_prompt(two, fields) == "a: {prompt}"  # what is put in names nothing
    for other in ({}, {"aspect": 3}):  # a number is no text
        with pytest.raises(UserError, match="needs 'aspect'; give it with --file PROMPTS.jsonl"):
            prompts.format_prompt(two, {"prompt": "a", **other})
    attribute = replace(CONFIG, prompt_format="{prompt.__class__}")
    assert prompts.format_prompt(attribute, {"prompt": "a"}) == "{prompt.__class__}"


def test_a_prompt_that_begins_with_the_start_has_one():
    found = encode(["abc", "bc", "ac"], start=(1, 2))
    # the first begins with a and b, the last with one of them only
    assert [row[keep].tolist() for row, keep in zip(found.tokens, found.mask, strict=True)] == [
        [1, 2, 3],
        [1, 2, 2, 3],
        [1, 2, 1, 3],
    ]


def test_start_token():
    recorded = replace(CONFIG, prompt_start=True, start=(3, 4))
    assert prompts.start_token(recorded, Letters()) == (3, 4)
    assert prompts.start_token(replace(recorded, start=()), Letters()) is None
    assert prompts.start_token(replace(CONFIG, prompt_start=True), Letters()) == 26
    assert prompts.start_token(replace(CONFIG, prompt_start=False), Letters()) is None


def test_truncation_note():
    note = prompts.truncation_note(["abc", "abcd", "a"], Letters(), 2)
    assert note.startswith("2 of 3 prompts have more than 2 tokens") and note.endswith("beginning")
    assert prompts.truncation_note(["ab"], Letters(), 2) == ""


def test_prompts_in_order_fill_the_last_batch_with_copies():
    tokens = np.arange(6, dtype=np.int32).reshape(3, 2)
    found = prompts.PromptSet(tokens, tokens > -1, {"row": np.array([7, 8, 9])})
    first, last = found.in_order(2)
    assert first.tokens.tolist() == [[0, 1], [2, 3]] and first.index.tolist() == [0, 1]
    assert last.tokens.tolist() == [[4, 5], [4, 5]] and last.index.tolist() == [2, 3]
    assert last.extra["row"].tolist() == [9, 9]
