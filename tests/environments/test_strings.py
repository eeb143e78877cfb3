"""Strings in the program against Python's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.environments import strings

WIDTH = 12
LETTERS = "019+-. \t\r\nabné"
TEXTS = st.text(LETTERS, max_size=WIDTH).filter(lambda x: len(x.encode()) <= WIDTH)
NUMBERS = st.integers(-(2**31) + 1, 2**31 - 1)


def padded(text: str) -> strings.String:
    return strings.string(text, WIDTH)


def read(text: strings.String) -> bytes:
    """The bytes; behind them all are 0."""
    whole = bytes(np.asarray(text.bytes))
    assert not any(whole[int(text.length) :])
    return whole[: int(text.length)]


first_line = jax.jit(strings.first_line)
parse_integer = jax.jit(strings.parse_integer)
cut = jax.jit(strings.cut)
join = jax.jit(lambda *parts: strings.join([*parts, "!"], 8))
write = jax.jit(strings.write_integer)
fill = jax.jit(lambda x: strings.write_integer(x, digits=3, fill=True))
find = jax.jit(lambda text: strings.find(text, ["a", "ab", "", "longer than the text"]))
digits = jax.jit(strings.is_digit)


@given(TEXTS)
def test_the_first_line_without_spaces_around_it(text):
    assert read(first_line(padded(text))).decode() == text.split("\n")[0].strip(" \t\r")


@given(TEXTS | st.from_regex(r"[+-]?[0-9]{1,10}", fullmatch=True))
def test_an_integer(text):
    """Whatever else is in it, such as a space, makes it unreadable."""
    bare = text[1:] if text[:1] in ("+", "-") else text
    readable = bare.isascii() and bare.isdigit() and len(bare) <= 9
    value, good = parse_integer(padded(text))
    assert good == readable and value == (int(text) if readable else 0)


@given(NUMBERS)
def test_an_integer_is_written_as_python_does(number):
    assert read(write(jnp.int32(number))).decode() == str(number)


@given(st.integers(-(10**9) + 1, 10**9 - 1))
def test_what_is_written_can_be_read(number):
    value, good = parse_integer(jax.tree.map(jnp.asarray, write(jnp.int32(number))))
    assert good and value == number


@pytest.mark.parametrize(
    ("number", "text"), [(0, b"000"), (7, b"007"), (-42, b"-042"), (1234, b"234")]
)
def test_zeros_in_front(number, text):
    assert read(fill(jnp.int32(number))) == text


@given(TEXTS, st.integers(-3, 15), st.integers(-3, 15))
def test_a_cut(text, begin, end):
    begin_, whole = max(begin, 0), text.encode()
    assert read(cut(padded(text), begin, end)) == whole[begin_ : max(end, begin_)]


@given(TEXTS, TEXTS)
def test_parts_one_behind_the_other(first, second):
    assert read(join(padded(first), padded(second))) == (first + second + "!").encode()[:8]


@given(st.sampled_from(["a", "ab", "abc", "", "b", "A"]))
def test_which_word_it_is(text):
    words = ["a", "ab", ""]
    assert find(padded(text)) == (words.index(text) if text in words else -1)


def test_a_narrow_text_may_be_compared_with_longer_words():
    assert strings.find(strings.string("no"), ["north", "no"]) == 1


def test_digits():
    every = jnp.arange(256, dtype=jnp.uint8)
    assert bytes(np.flatnonzero(digits(every)).astype(np.uint8)) == b"0123456789"


def test_one_of_several_texts():
    chosen = jax.vmap(lambda i: strings.choose(i, ["", "é", "abc"], 4))(jnp.arange(3))
    assert chosen.length.tolist() == [0, 2, 3]
    assert bytes(np.asarray(chosen.bytes)) == b"\0\0\0\0" + "é".encode() + b"\0\0abc\0"


def test_a_text_that_is_too_long():
    with pytest.raises(ValueError, match="a text of 3 bytes does not fit in 2"):
        strings.string("abc", 2)
