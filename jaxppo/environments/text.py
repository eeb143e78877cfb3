"""Environments that read and write text: the same ones for every tokenizer.

A game is written on bytes (`TextEnvironment`); `on_bytes` turns it into an environment
on the tokens of one vocabulary, inside the program.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, UInt8

from jaxppo.environments.strings import String
from jaxppo.errors import UserError
from jaxppo.pretrained import token_bytes
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.types import Environment, Observation, Turn

PRINTABLE = bytes(range(32, 127)) + b"\n"


class Reply(struct.PyTreeNode):
    """What an environment answers to the text of a turn."""

    text: UInt8[Array, "B R"]  # aligned on the left
    length: Int[Array, "B"]
    reward: Float[Array, "B"]  # of the turn; not finite = the row is invalid
    done: Bool[Array, "B"]


class TextEnvironment(NamedTuple):
    """A world that reads and writes bytes, as pure functions of arrays over rows."""

    reset: Callable[[PyTree, Array], PyTree]  # reset(instance [B ...], keys [B]) -> state
    # step(state, text UInt8[B W], length Int[B]) -> (state, Reply)
    step: Callable[[PyTree, Array, Array], tuple[PyTree, Reply]]
    max_turns: int
    turn_length: int  # W, most bytes of a turn that are read
    reply_length: int  # R, most bytes of a reply
    alphabet: bytes = PRINTABLE  # the bytes that replies are made of


# player(instance, replies so far, generator) -> the text of the next turn
Player = Callable[[Mapping[str, Any], Sequence[str], np.random.Generator], str]


class Game(NamedTuple):
    """An environment with its data, a scripted player and what can be reached.

    An instance is a dict: "prompt", the text before the first turn, and arrays or
    numbers, which `Prompts.extra` takes.
    """

    environment: TextEnvironment
    instances: Callable[[int, int], list[dict[str, Any]]]  # (number, seed) -> instances
    script: Player  # plays as well as the game says
    random: Player  # knows the rules alone
    optimum: float  # the expected return of the best policy, or what the game says


class Answer(NamedTuple):
    """The reply to one row."""

    text: String
    reward: Float[Array, ""] | float
    done: Bool[Array, ""] | bool


class Row(struct.PyTreeNode):
    """The state of a row: the game's own, and what every game needs."""

    own: PyTree
    key: Array
    turn: Int[Array, ""]
    done: Bool[Array, ""]


def from_rows(
    reset: Callable[[PyTree], PyTree],
    step: Callable[[PyTree, String, Array, Int[Array, ""]], tuple[PyTree, Answer]],
    *,
    max_turns: int,
    turn_length: int,
    reply_length: int,
    alphabet: bytes = PRINTABLE,
) -> TextEnvironment:
    """An environment from functions of one row.

    `reset(instance) -> state`, and `step(state, text, key, turn) -> (state, Answer)`
    with another key at every turn and turn = 0, 1, ... The episode ends after
    `max_turns` at the latest. Behind its end the state stays, the reply is empty and
    the reward 0.
    """

    def start(instance: PyTree, key: Array) -> Row:
        own = jax.tree.map(jnp.asarray, reset(instance))
        return Row(own, key, jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    def go_on(row: Row, text: Array, length: Array) -> tuple[Row, Reply]:
        length = jnp.clip(length, 0, turn_length).astype(jnp.int32)
        inside = jnp.arange(turn_length, dtype=jnp.int32) < length
        said = String(jnp.where(inside, text, 0).astype(jnp.uint8), length)
        own, answer = step(row.own, said, jax.random.fold_in(row.key, row.turn), row.turn)
        own = jax.tree.map(lambda old, new: jnp.where(row.done, old, new), row.own, own)
        done = row.done | answer.done | (row.turn + 1 >= max_turns)
        size = len(answer.text.bytes)
        reply = jnp.pad(answer.text.bytes, (0, max(reply_length - size, 0)))[:reply_length]
        shown = jnp.where(row.done, 0, jnp.clip(answer.text.length, 0, reply_length))
        reward = jnp.where(row.done, 0.0, jnp.asarray(answer.reward, jnp.float32))
        turn = jnp.where(row.done, row.turn, row.turn + 1)
        return Row(own, row.key, turn, done), Reply(reply, shown.astype(jnp.int32), reward, done)

    return TextEnvironment(
        jax.vmap(start), jax.vmap(go_on), max_turns, turn_length, reply_length, alphabet
    )


def stack(instances: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays of instances, [B ...], without their prompts: what `reset` takes."""
    names = [name for name in instances[0] if name != "prompt"]
    return {name: np.stack([np.asarray(x[name]) for x in instances]) for name in names}


class Tables(NamedTuple):
    """Token -> bytes and byte -> token of a vocabulary."""

    flat: UInt8[Array, "N"]  # the bytes of all tokens, one behind the other
    start: Int32[Array, "V"]  # where a token's bytes begin
    length: Int32[Array, "V"]
    token: Int32[Array, "256"]  # of each byte; -1 = none


def make_tables(tokenizer: Tokenizer, *, vocab_size: int | None = None) -> Tables:
    """The tables of a tokenizer, in which special tokens and ends of text have no
    bytes.

    Args:
      vocab_size: of the model; ids that the tokenizer does not have write nothing.
    """
    table, length = token_bytes.make_table(tokenizer, vocab_size=vocab_size)
    written = [bytes(row[:n]) for row, n in zip(table, length)]
    for end in tokenizer.eos_ids:
        written[end] = b""
    # a model with byte fallback has read letters, not their bytes
    fallback = lambda i: token_bytes.BYTE.fullmatch(tokenizer.token(i)) is not None
    return tables_of(written, rare=(i for i in range(len(written)) if fallback(i)))


def tables_of(written: Sequence[bytes], *, rare: Iterable[int] = ()) -> Tables:
    """The tables of a vocabulary, given the bytes of each token. A byte that several
    tokens write is written by the first of them that is not `rare`.

    >>> tables_of([b"", b"a", b"b"]).token[ord("a")].item()
    1
    """
    lengths = np.array([len(x) for x in written], np.int32)
    start = np.cumsum(lengths, dtype=np.int32) - lengths
    flat = np.frombuffer(b"".join(written) or b"\0", np.uint8)
    token, last = np.full(256, -1, np.int32), set(rare)
    ids = [i for i in range(len(written)) if len(written[i]) == 1]
    for i in sorted(ids, key=lambda i: (i in last, i), reverse=True):
        token[written[i][0]] = i
    return Tables(*map(jnp.asarray, (flat, start, lengths, token)))


def decode(
    tables: Tables, tokens: Int[Array, "B M"], length: Int[Array, "B"], width: int
) -> tuple[UInt8[Array, "B W"], Int[Array, "B"]]:
    """(the bytes of the first `length` tokens of each row, aligned on the left and 0
    behind the end; their number), cut after `width` bytes.
    """

    def row(tokens, length):
        there = jnp.arange(len(tokens), dtype=jnp.int32) < length
        sizes = jnp.where(there, tables.length[tokens], 0)
        ends = jnp.cumsum(sizes, dtype=jnp.int32)
        place = jnp.arange(width, dtype=jnp.int32)
        # the token that writes the byte at a place: as many as end before it
        writer = (ends[None] <= place[:, None]).sum(1, dtype=jnp.int32)
        writer = jnp.minimum(writer, len(tokens) - 1)
        source = tables.start[tokens[writer]] + place - (ends - sizes)[writer]
        total = jnp.minimum(ends[-1], width)
        found = tables.flat[jnp.clip(source, 0, len(tables.flat) - 1)]
        return jnp.where(place < total, found, 0).astype(jnp.uint8), total

    return jax.vmap(row)(tokens, length)


def on_bytes(
    environment: TextEnvironment, tables: Tables, *, turn_length: int | None = None
) -> Environment:
    """The environment on the tokens of a vocabulary.

    The text of a turn is what its tokens write. Special tokens, the end of text among
    them, write nothing; a stop text such as a newline stays. Only the first
    `environment.turn_length` bytes are read. A reply has one token a byte. An empty
    reply becomes a newline, for the policy has to read something, and a byte outside
    the alphabet a question mark (each of them the alphabet's first byte, if it has
    none). When the episode is done nothing is left to read: the length is 0.

    Args:
      turn_length: most tokens of a turn; by default as many as it may have bytes.

    Raises UserError if a byte of the alphabet has no token.
    """
    token, alphabet = np.asarray(tables.token), environment.alphabet
    missing = bytes(byte for byte in alphabet if token[byte] < 0)
    if missing or not alphabet:
        raise UserError(
            f"the environment writes the bytes {missing!r}, but no token of the vocabulary is one "
            "of them alone; use a tokenizer over bytes, or one that has these letters"
        )
    own = lambda letter: token[letter if letter in alphabet else alphabet[0]]
    known = np.isin(np.arange(256), list(alphabet))
    of_byte = jnp.asarray(np.where(known, token, own(ord("?"))), jnp.int32)
    newline, width = jnp.asarray(own(ord("\n")), jnp.int32), environment.reply_length

    def step(state: PyTree, turn: Turn) -> tuple[PyTree, Observation]:
        text, length = decode(tables, turn.tokens, turn.length, environment.turn_length)
        state, reply = environment.step(state, text, length)
        size = jnp.clip(reply.length, 0, width).astype(jnp.int32)
        place = jnp.arange(width, dtype=jnp.int32)[None] - (width - size)[:, None]
        letters = jnp.take_along_axis(reply.text, jnp.maximum(place, 0), axis=1)
        tokens = jnp.where(place >= 0, of_byte[letters], newline)
        size = jnp.where(reply.done, 0, jnp.maximum(size, 1))
        return state, Observation(tokens, size, reply.reward, reply.done)

    turn_length = environment.turn_length if turn_length is None else turn_length
    return Environment(environment.reset, step, environment.max_turns, turn_length, width)
