import asyncio
import logging
import os
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo.rewards.host import decode_responses, on_host
from jaxppo.rewards.in_program import count_token


def decode(rows):
    """Tokens as letters: 2 is c."""
    return ["".join(chr(ord("a") + token) for token in row) for row in rows]


@pytest.fixture(scope="module")
def rolled(llama):
    return toys.roll(llama, toys.prompts())


@pytest.mark.ci
def test_decoded_text_arrives(rolled):
    seen = []

    def judge(prompt, response):
        seen.append((prompt, response))
        return len(response)

    scores, valid = jax.block_until_ready(jax.jit(on_host(judge, decode))({}, rolled))
    cut, keep = 4, np.asarray(rolled.mask) > 0
    want = [
        (decode([row[:cut][on[:cut]]])[0], decode([row[cut:][sampled]])[0])
        for row, on, sampled in zip(
            np.asarray(rolled.tokens), np.asarray(rolled.attend), keep, strict=True
        )
    ]
    assert sorted(seen[:8]) == sorted(want)
    assert any(
        response.endswith("b") for _, response in want
    )  # the end of text is part of it; padding is not
    assert scores.tolist() == rolled.mask.sum(1).tolist()
    assert scores.dtype == jnp.float32 and valid.all()


@pytest.mark.parametrize("pure", [True, False])
def test_it_equals_the_same_reward_in_the_program(rolled, pure):
    hosted = on_host(lambda prompt, response: response.count("d"), decode, pure=pure)
    for got, want in zip(jax.jit(hosted)({}, rolled), count_token(3)({}, rolled), strict=True):
        np.testing.assert_array_equal(got, want)
    assert count_token(3)({}, rolled)[0].sum() > 0


def raises():
    raise RuntimeError("no idea")


def cancelled():
    raise asyncio.CancelledError("by the judge")  # no Exception, but a BaseException


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (raises, "RuntimeError: no idea"),
        (lambda: None, "a reward must be a number, but is None"),
        (lambda: "0.5", "a reward must be a number, but is '0.5'"),
        (lambda: [1.0, 2.0], "TypeError"),
        (lambda: float("nan"), "ValueError: a reward must be finite in float32, but is nan"),
        (lambda: float("inf"), "ValueError: a reward must be finite in float32, but is inf"),
        (lambda: 1e39, "ValueError: a reward must be finite in float32, but is 1e+39"),
        (lambda: {"a": 1.0}, "a reward must be a number, but is {'a': 1.0}"),
        (lambda: sys.exit(3), "SystemExit: 3"),
        (cancelled, "CancelledError: by the judge"),
        (lambda: 10**400, "OverflowError"),
    ],
)
def test_anything_but_a_finite_number_makes_the_row_invalid(rolled, answer, reason, caplog):
    """Rows with a d in their response are invalid; the others get their scores."""
    hosted = on_host(lambda prompt, response: answer() if "d" in response else 2, decode)
    with caplog.at_level(logging.WARNING, logger="jaxppo.rewards.host"):
        scores, valid = jax.device_get(jax.jit(hosted)({}, rolled))
    bad = np.asarray(count_token(3)({}, rolled)[0]) > 0
    assert 0 < bad.sum() < 8
    np.testing.assert_array_equal(valid, ~bad)
    np.testing.assert_array_equal(scores, np.where(bad, 0.0, 2.0))
    said = [record.getMessage() for record in caplog.records]
    assert all(reason in text for text in said)
    # JAX may call a pure function more than once.
    assert {text.split(" (")[0] for text in said} == {
        f"the reward of row {row}" for row in np.flatnonzero(bad)
    }


@pytest.mark.parametrize(
    "number", [3, True, np.float32(3), np.int64(3), np.array(3.0), jnp.float32(3)]
)
def test_every_type_of_number_is_a_score(rolled, number):
    scores, valid = on_host(lambda prompt, response: number, decode)({}, rolled)
    assert valid.all()
    assert scores.tolist() == [float(number)] * 8


def test_an_impure_judge_is_called_every_time(rolled):
    """Also with the same rollout."""
    calls = []
    judge = on_host(
        lambda prompt, response: calls.append(response) or len(calls), decode, pure=False
    )
    program = jax.jit(lambda r: (judge({}, r)[0], judge({}, r)[0]))
    first, second = program(rolled)
    jax.block_until_ready((first, second))
    assert len(calls) == 16
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda n: [1.0] * (n - 1), "expected 8 rewards, but got 7 rewards"),
        (lambda n: 3.0, "expected 8 rewards, but got a float"),
        (lambda n: dict.fromkeys(range(n), 1.0), "expected 8 rewards, but got a dict"),
        (lambda n: set(range(n)), "expected 8 rewards, but got a set"),
        (lambda n: "12345678", "expected 8 rewards, but got a str"),
        (lambda n: cancelled(), "CancelledError: by the judge"),
        (lambda n: raises(), "RuntimeError: no idea"),
    ],
)
def test_a_batched_judge_that_fails(rolled, answer, reason, caplog):
    hosted = on_host(lambda prompts, responses: answer(len(prompts)), decode, batched=True)
    with caplog.at_level(logging.WARNING, logger="jaxppo.rewards.host"):
        _, valid = jax.device_get(jax.jit(hosted)({}, rolled))
    assert not valid.any()
    assert all(reason in record.getMessage() for record in caplog.records)


def test_a_batched_judge(rolled):
    """It equals a judge of single rows, and one bad row is left out."""
    whole = on_host(
        lambda prompts, responses: [len(r) if "d" not in r else None for r in responses],
        decode,
        batched=True,
    )
    single = on_host(
        lambda prompt, response: len(response) if "d" not in response else None, decode
    )
    for got, want in zip(whole({}, rolled), single({}, rolled), strict=True):
        np.testing.assert_array_equal(got, want)


def with_references(rolled):
    """Row i has the reference c, d, e, ... of i letters; the slots after it do not count."""
    reference = jnp.broadcast_to(jnp.arange(2, 9, dtype=jnp.int32), (8, 7))
    return rolled.replace(
        extra={"reference": reference, "reference_length": jnp.arange(8, dtype=jnp.int32)}
    )


def test_references_arrive_as_text(rolled):
    seen = []

    def judge(prompt, response, reference):
        seen.append((response, reference))
        return len(reference) - len(response)

    scores, valid = jax.jit(on_host(judge, decode, references=True))({}, with_references(rolled))
    assert {reference for _, reference in seen} == {"cdefghi"[:i] for i in range(8)}
    np.testing.assert_array_equal(scores, np.arange(8) - np.asarray(rolled.mask.sum(1)))
    assert valid.all()
    whole = on_host(
        lambda p, r, w: [len(b) - len(a) for a, b in zip(r, w, strict=True)],
        decode,
        batched=True,
        references=True,
    )
    np.testing.assert_array_equal(whole({}, with_references(rolled))[0], scores)


def test_a_judge_that_fails_on_a_reference(rolled, caplog):
    """Rows 6 and 7 have an h in their reference."""
    hosted = on_host(
        lambda prompt, response, reference: raises() if "h" in reference else 2,
        decode,
        references=True,
    )
    with caplog.at_level(logging.WARNING, logger="jaxppo.rewards.host"):
        scores, valid = jax.device_get(jax.jit(hosted)({}, with_references(rolled)))
    assert scores.tolist() == [2.0] * 6 + [0.0] * 2 and valid.tolist() == [True] * 6 + [False] * 2
    said = {record.getMessage().split(" (")[0] for record in caplog.records}
    assert said == {"the reward of row 6", "the reward of row 7"}


def test_a_response_is_what_its_prompt_goes_on_with():
    """A decoder that drops the first space, as SentencePiece's, and joins bytes to characters."""
    words = {1: b" the", 2: b" film", 3: b" is", 4: b"\xc3", 5: b"\xa9", 6: b"!"}

    def decode(rows):
        texts = [b"".join(words[i] for i in row).decode(errors="replace") for row in rows]
        return [text.removeprefix(" ") for text in texts]

    prompts, responses = decode_responses(
        decode, [[1, 2], [1, 4], [1, 4], [], [1, 2]], [[3, 6], [5, 6], [6], [3], []]
    )
    # half a character of the prompt is one of the response, once it is whole
    assert prompts == ["the film", "the\ufffd", "the\ufffd", "", "the film"]
    assert responses == [" is!", "é!", "!", "is", ""]


def test_the_working_directory_stays_and_a_forked_child_ends(rolled, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()

    def judge(prompts, responses):
        os.chdir("below")
        (tmp_path / f"{os.fork() > 0}").touch()  # parent and child both go on
        return [1.0] * len(prompts)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX and Python 3.12 warn of forks
        scores, valid = on_host(judge, decode, batched=True)({}, rolled)
        jax.block_until_ready(scores)
    assert valid.all() and Path.cwd() == tmp_path
    assert "a reward changed the working directory" in caplog.text
    assert (tmp_path / "True").exists()
