"""Questions, calls and answers."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxppo.environments import calculator, strings
from jaxppo.environments.play import play

NUMBERS = st.integers(0, 99999)
calculate = jax.jit(calculator.calculate)
make = functools.cache(calculator.make)


def call(text: str) -> str | None:
    """The result of a call, or None if it cannot be read."""
    result, readable = calculate(strings.string(text, 13))
    written = bytes(np.asarray(result.bytes))[: int(result.length)].decode()
    return written if readable else None


@given(NUMBERS, st.sampled_from("+-*"), NUMBERS)
@example(99999, "*", 99999)
@example(0, "*", 99999)
@example(0, "-", 99999)
@example(50000, "*", 20000)  # 10⁹: zeros in the second half
@example(46341, "*", 46341)  # just above int32
@example(10000, "*", 10)  # exactly 10⁵
def test_results_are_pythons(a, sign, b):
    assert call(f"={a}{sign}{b}") == str(calculator.OPERATIONS[sign](a, b))


def test_zeros_in_front_are_read():
    assert call("=007+00008") == "15"


@pytest.mark.parametrize(
    "text",
    [
        *("", "=", "=1", "=1+", "=+1", "=1/2", "=1++2", "=1--2", "=-1+2", "=1+2+3", "=123456+1"),
        *("=1+123456", "= 1+2", "=1+2 ", "1+2", "=a+b", "==1+2", "=1+2="),
    ],
)
def test_calls_that_cannot_be_read(text):
    assert call(text) is None


def question(a: int, sign: str, b: int) -> dict:
    answer = str(calculator.OPERATIONS[sign](a, b)).encode()
    table = np.zeros(10, np.uint8)
    table[: len(answer)] = list(answer)
    return {"prompt": f"{a}{sign}{b}=", "answer": table, "answer_length": np.int32(len(answer))}


def episode(instance: dict, *turns: str, tool: bool = True):
    said = iter(turns)
    return play(make(tool=tool), [instance], lambda *_: next(said))[0]


def test_a_call_and_the_answer():
    found = episode(question(99999, "*", 99999), "=99999*99999\n", "9999800001\n")
    assert found.replies == ["9999800001\n", ""] and found.rewards == [0, 1]


@pytest.mark.parametrize(
    ("turn", "reward"),
    [("-2\n", 1), (" -2", 1), ("-02\n", 0), ("2\n", 0), ("-2 1\n", 0), ("", 0), ("-22\n", 0)],
)
def test_an_answer_ends_the_episode(turn, reward):
    found = episode(question(100, "-", 102), turn)
    assert found.rewards == [reward] and found.replies == [""] and found.done


def test_calls_alone_have_no_reward():
    """Neither a call in the last turn, nor one whose text would be right."""
    found = episode(question(1, "+", 2), "=1/2\n", "=1+2\n")
    assert found.replies == ["?\n", "3\n"] and found.rewards == [0, 0] and found.done


@pytest.mark.ci
def test_without_the_tool_every_call_is_unreadable():
    found = episode(question(1, "+", 2), "=1+2\n", "3\n", tool=False)
    assert found.replies == ["?\n", ""] and found.rewards == [0, 1]
    game = make(tool=False)
    assert all(x.turns and x.score == 1 for x in play(game, game.instances(20, 0)))


def test_questions_have_the_digits_asked_for():
    game = calculator.make(digits=(1, 2), operations="*")
    for x in game.instances(200, 0):
        a, b = x["prompt"].removesuffix("=").split("*")
        assert {len(a), len(b)} <= {1, 2} and str(int(a)) == a and str(int(b)) == b
        assert bytes(x["answer"]).rstrip(b"\0").decode() == str(int(a) * int(b))
        assert x["answer_length"] == len(str(int(a) * int(b)))
