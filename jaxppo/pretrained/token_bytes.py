"""The bytes that each token of a vocabulary writes, as arrays, and the automaton that
finds stop texts in them.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32, UInt8
from tokenizers.pre_tokenizers import ByteLevel

from jaxppo.errors import UserError
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.sampling import Stops

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of byte fallback
LETTERS = ByteLevel.alphabet()  # GPT-2's: a printable byte is its own letter
# letters from 256 on are those of the other bytes, in order
BYTES = [*range(256), *sorted({*range(256)} - {*map(ord, LETTERS)})]
BYTE_OF = {letter: BYTES[ord(letter)] for letter in LETTERS}


class TokenBytes(NamedTuple):
    """The bytes of each token; M is the longest token's."""

    table: UInt8[np.ndarray, "V M"]  # 0 behind a token's end
    length: Int32[np.ndarray, "V"]


def make_table(
    tokenizer: Tokenizer, *, vocab_size: int | None = None, skip_special: bool = True
) -> TokenBytes:
    """The bytes that each token adds to a text that it does not begin.

    Args:
      vocab_size: of the model; ids that the tokenizer does not have write nothing.
      skip_special: special tokens write nothing, as in `Tokenizer.decode`; otherwise
        what they are called.
    """
    ids = range(tokenizer.vocab_size)
    kinds = decoder_kinds(tokenizer)
    if "ByteLevel" in kinds:
        written = [_read_byte_level(tokenizer.token(i)) for i in ids]
    else:
        written = [text.encode() for text in _texts_inside(tokenizer)]
        if "ByteFallback" in kinds:
            for i in ids:
                if found := BYTE.fullmatch(tokenizer.token(i)):
                    written[i] = bytes.fromhex(found[1])
    if skip_special:
        shown = (tokenizer.decode_batch([[i] for i in ids], skip_special=x) for x in (True, False))
        for i, (skipped, whole) in enumerate(zip(*shown, strict=True)):
            written[i] = b"" if whole and not skipped else written[i]
    length = np.zeros(vocab_size or len(written), np.int32)
    length[: len(written)] = [len(x) for x in written]
    table = np.zeros((len(length), length.max()), np.uint8)
    for i, x in enumerate(written):
        table[i, : len(x)] = list(x)
    return TokenBytes(table, length)


def make_stops(texts: Sequence[str], tokenizer: Tokenizer, *, vocab_size: int) -> Stops:
    """The automaton that finds stop texts in a response (Aho and Corasick 1975,
    https://doi.org/10.1145/360825.360855). A special token is found by its name.

    It has a state for each beginning of a text, and few columns: most tokens have no
    byte of the texts and act alike.

    Raises UserError for a text that no sequence of tokens writes, such as one in
    capitals if the tokenizer knows small letters only.
    """
    written = make_table(tokenizer, vocab_size=vocab_size, skip_special=False)
    for text in texts:
        following, ends = _over_tokens(*_over_bytes([text.encode()]), written)
        if not ends[_reachable(following)].any():
            raise UserError(f"--stop {text!r}: the tokenizer cannot write this text; change it")
    following, ends = _over_tokens(*_over_bytes([text.encode() for text in texts]), written)
    both = np.concatenate([following, ends])
    _, first, column = np.unique(both, axis=1, return_index=True, return_inverse=True)
    arrays = (column.reshape(-1).astype(np.int32), following[:, first], ends[:, first])
    return Stops(*map(jnp.asarray, arrays))


def decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """The types of the steps that turn tokens into text, such as {"ByteLevel"}."""
    decoder = tokenizer.decoder
    if decoder is None:
        return set()
    found = json.loads(decoder.__getstate__())
    return {found["type"], *(step["type"] for step in found.get("decoders", ()))}


def _read_byte_level(token: str) -> bytes:
    """The bytes of a token in GPT-2's spelling: a printable character for each byte."""
    try:
        return bytes(BYTE_OF[letter] for letter in token)
    except KeyError:  # an added token, such as one with a space
        return token.encode()


def _texts_inside(tokenizer: Tokenizer) -> list[str]:
    """The text of each token behind another one: many decoders drop a space at the
    beginning of a text.
    """
    decode = lambda rows: tokenizer.decode_batch(rows, skip_special=False)
    ids = range(tokenizer.vocab_size)
    alone = decode([[i] for i in ids])
    twice = decode([[i, i] for i in ids])
    usable = lambda i: alone[i].strip() and "\ufffd" not in alone[i]
    before = next((i for i in ids if usable(i) and twice[i].startswith(alone[i])), None)
    if before is None:
        return alone
    start, behind = alone[before], decode([[before, i] for i in ids])
    return [
        text[len(start) :] if text.startswith(start) else own
        for text, own in zip(behind, alone, strict=True)
    ]


def _over_bytes(texts: Sequence[bytes]) -> tuple[Int32[np.ndarray, "S 256"], Bool[np.ndarray, "S"]]:
    """(the next state after a byte, the states in which a text is complete)."""
    children: list[dict[int, int]] = [{}]  # of each beginning of a text
    complete = [False]
    for text in texts:
        state = 0
        for byte in text:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                complete.append(False)
            state = children[state][byte]
        complete[state] = True
    following = np.zeros((len(children), 256), np.int32)
    # the longest other beginning that a state ends with
    shorter, states = [0] * len(children), [0]
    for state in states:  # shorter ones first
        following[state] = following[shorter[state]]
        complete[state] |= complete[shorter[state]]
        for byte, child in children[state].items():
            shorter[child] = int(following[state, byte])
            following[state, byte] = child
            states.append(child)
    return following, np.array(complete)


def _over_tokens(
    following: Int32[np.ndarray, "S 256"], complete: Bool[np.ndarray, "S"], written: TokenBytes
) -> tuple[Int32[np.ndarray, "S V"], Bool[np.ndarray, "S V"]]:
    """(the next state after a token, whether one of its bytes completes a text)."""
    count = len(written.length)
    states = np.tile(np.arange(len(following), dtype=np.int32)[:, None], (1, count))
    ends = np.zeros(states.shape, bool)
    for place in range(written.table.shape[1]):
        has = np.flatnonzero(written.length > place)
        states[:, has] = following[states[:, has], written.table[has, place][None]]
        ends[:, has] |= complete[states[:, has]]
    return states, ends


def _reachable(following: Int32[np.ndarray, "S V"]) -> list[int]:
    """The states that tokens lead to from the start."""
    found: set[int] = set()
    new = {0}
    while new:
        found |= new
        new = set(np.unique(following[sorted(new)]).tolist()) - found
    return sorted(found)
