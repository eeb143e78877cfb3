"""Strings of bytes in the program: read, compare and write them.

A string is an array of bytes, aligned on the left and 0 behind its end, and a length.
The functions take one string; `jax.vmap` makes them take a batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

SPACES = (ord(" "), ord("\t"), ord("\r"))


class String(NamedTuple):
    """Bytes with a length known at run time."""

    bytes: UInt8[Array, "W"]  # 0 behind the end
    length: Int[Array, ""]


def string(text: str | bytes, width: int | None = None) -> String:
    """The string of a text, in an array of `width` bytes (by default, as many as it
    has). Raises ValueError for a text that is longer.

    >>> string("ab", 3)
    String(bytes=Array([97, 98,  0], dtype=uint8), length=Array(2, dtype=int32))
    """
    letters, lengths = table([text], width)
    return String(jnp.asarray(letters[0]), jnp.asarray(lengths[0]))


def first(mask: Bool[Array, "N"], default: Int[Array, ""] | int) -> Int[Array, ""]:
    """The place of the first True, or the default.

    >>> first(jnp.array([False, True, True]), -1).item()
    1
    """
    place = jnp.argmax(mask).astype(jnp.int32)
    return jnp.where(mask.any(), place, jnp.asarray(default, jnp.int32))


def cut(text: String, begin: Int[Array, ""] | int, end: Int[Array, ""] | int) -> String:
    """The bytes from `begin` up to, not including, `end`; fewer if it has fewer."""
    begin = jnp.clip(jnp.asarray(begin, jnp.int32), 0, text.length)
    length = jnp.clip(jnp.asarray(end, jnp.int32), begin, text.length) - begin
    place = jnp.arange(len(text.bytes), dtype=jnp.int32)
    moved = text.bytes[jnp.minimum(place + begin, len(text.bytes) - 1)]
    return String(jnp.where(place < length, moved, 0).astype(jnp.uint8), length)


def first_line(text: String) -> String:
    """What stands before the first newline, without spaces around it."""
    place = jnp.arange(len(text.bytes), dtype=jnp.int32)
    stop = first((text.bytes == ord("\n")) & (place < text.length), text.length)
    space = jnp.isin(text.bytes, jnp.array(SPACES, jnp.uint8))
    kept = ~space & (place < stop)
    end = jnp.where(kept, place + 1, 0).max()
    return cut(text, first(kept, 0), end)


def find(text: String, words: Sequence[str]) -> Int[Array, ""]:
    """The number of the first of the words that equals the text, or −1.

    >>> find(string("south"), ["north", "south"]).item()
    1
    """
    width = max(len(text.bytes), *(len(word.encode()) for word in words))
    letters, lengths = table(words, width)
    whole = jnp.pad(text.bytes, (0, width - len(text.bytes)))
    same = (letters == whole[None]).all(1) & (lengths == text.length)
    return first(same, -1)


def is_digit(byte: UInt8[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Whether bytes are decimal digits."""
    return (byte >= ord("0")) & (byte <= ord("9"))


def parse_integer(text: String) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """(the integer, whether the text is one): a sign or none, one to nine digits
    (they fit in int32), and nothing else. The integer is 0 if the text is none.

    >>> [x.item() for x in parse_integer(string("-042"))]
    [-42, True]
    """
    first = text.bytes[0]
    signed = (text.length > 0) & ((first == ord("-")) | (first == ord("+")))
    digits = cut(text, signed.astype(jnp.int32), text.length)
    width = min(len(digits.bytes), 9)
    place = jnp.arange(width, dtype=jnp.int32)
    good = (is_digit(digits.bytes[:width]) | (place >= digits.length)).all()
    good &= (digits.length >= 1) & (digits.length <= width)
    power = jnp.maximum(digits.length - 1 - place, 0)
    scale = jnp.asarray(10 ** np.arange(9), jnp.int32)[jnp.minimum(power, 8)]
    value = digits.bytes[:width].astype(jnp.int32) - ord("0")
    value = jnp.where(place < digits.length, value * scale, 0).sum(dtype=jnp.int32)
    value = jnp.where(signed & (first == ord("-")), -value, value)
    return jnp.where(good, value, 0).astype(jnp.int32), good


def write_integer(value: Int[Array, ""], *, digits: int = 10, fill: bool = False) -> String:
    """An integer as text, with at most this many digits: value mod 10^digits. `fill`
    writes zeros in front.

    >>> bytes(write_integer(jnp.int32(-42), digits=3).bytes)
    b'-42\\x00'
    """
    size, powers = jnp.abs(value), jnp.asarray(10 ** np.arange(digits)[::-1], jnp.int32)
    found = (size // powers % 10).astype(jnp.int32)
    begin = 0 if fill else first(found > 0, digits - 1)
    letters = String((found + ord("0")).astype(jnp.uint8), jnp.asarray(digits, jnp.int32))
    minus = String(jnp.array([ord("-")], jnp.uint8), (value < 0).astype(jnp.int32))
    return join([minus, cut(letters, begin, digits)], digits + 1)


def join(parts: Sequence[String | str], width: int) -> String:
    """The parts, one behind the other, cut after `width` bytes.

    >>> bytes(join([write_integer(jnp.int32(7)), "!"], 4).bytes)
    b'7!\\x00\\x00'
    """
    place = jnp.arange(width, dtype=jnp.int32)
    out, end = jnp.zeros(width, jnp.uint8), jnp.zeros((), jnp.int32)
    for part in parts:
        own = string(part) if isinstance(part, str) else part
        if not len(own.bytes):
            continue
        source = place - end
        inside = (source >= 0) & (source < own.length)
        out = jnp.where(inside, own.bytes[jnp.clip(source, 0, len(own.bytes) - 1)], out)
        end += own.length
    return String(out, jnp.minimum(end, width).astype(jnp.int32))


def choose(number: Int[Array, ""], texts: Sequence[str], width: int | None = None) -> String:
    """One of the texts.

    >>> bytes(choose(jnp.int32(1), ["lower", "higher"], 6).bytes)
    b'higher'
    """
    letters, lengths = table(texts, width)
    return String(jnp.asarray(letters)[number], jnp.asarray(lengths)[number])


def table(
    texts: Sequence[str | bytes], width: int | None
) -> tuple[UInt8[np.ndarray, "N W"], Int[np.ndarray, "N"]]:
    """(the bytes of each text, their lengths), as NumPy arrays."""
    written = [text.encode() if isinstance(text, str) else text for text in texts]
    longest = max(map(len, written))
    width = longest if width is None else width
    if longest > width:
        raise ValueError(f"a text of {longest} bytes does not fit in {width}")
    letters = np.zeros((len(written), width), np.uint8)
    for row, text in zip(letters, written):
        row[: len(text)] = list(text)
    return letters, np.array([len(text) for text in written], np.int32)
