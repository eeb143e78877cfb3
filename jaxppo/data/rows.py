"""Rows of tokens for the supervised stages."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from jaxppo.config import Config, RunConfig
from jaxppo.data.prompts import (
    BatchSource,
    PromptSet,
    as_ids,
    batch_indices,
    numpy_prompts,
    pad_left,
    stack_batches,
    without_start,
)
from jaxppo.errors import UserError
from jaxppo.types import Prompts

Encode = Callable[[str], list[int]]
Start = int | Sequence[int] | None  # ids that begin a text, unless it begins with them
# entries of `extra` with a number for each token: they are cut with the tokens
TOKENWISE = ("weight",)


@dataclass(frozen=True)
class Rows:
    """Rows for `supervised.py`, drawn in an order that depends on (seed, cursor) alone.
    With `buckets` > 1 the rows of that many batches are sorted by length, and each
    batch is cut to the power-of-two fraction of L that holds its longest row: less
    padding, but a program for each width.
    """

    tokens: Int32[np.ndarray, "N L"]  # padded on the left
    mask: Bool[np.ndarray, "N L"]
    extra: dict[str, Any] = field(default_factory=dict)  # [N ...]
    unit: int = 1  # adjacent rows that stay together: 2 for pairs
    buckets: int = 1

    def __len__(self) -> int:
        return len(self.tokens) // self.unit

    def take(self, units: Int64[np.ndarray, "n"]) -> "Rows":
        """Return some of the units, in this order."""
        rows = self._rows(units)
        extra = {k: x[rows] for k, x in self.extra.items()}
        return replace(self, tokens=self.tokens[rows], mask=self.mask[rows], extra=extra)

    def _rows(self, units: np.ndarray) -> np.ndarray:
        return (units[:, None] * self.unit + np.arange(self.unit)[None]).reshape(-1)

    def batch(self, config: Config, cursor: int) -> Prompts:
        """Return the batch at a cursor."""
        if config.batch_size % self.unit:
            raise UserError(f"--batch-size {config.batch_size} must be even: rows come in pairs")
        units_per_batch = config.batch_size // self.unit
        size = self.buckets * units_per_batch
        window, place = divmod(cursor // config.batch_size, self.buckets)
        units = batch_indices(len(self), cursor=window * size, batch_size=size, seed=config.seed)
        width = self.tokens.shape[1]
        if self.buckets > 1:
            lengths = self.mask.sum(1).reshape(-1, self.unit).max(1)
            units = units[np.argsort(lengths[units], kind="stable")]
            place = np.random.default_rng([config.seed, window]).permutation(self.buckets)[place]
        rows = self._rows(units[place * units_per_batch : (place + 1) * units_per_batch])
        if self.buckets > 1:
            longest = max(int(self.mask[rows].sum(1).max()), 2)
            while width % 2 == 0 and width // 2 >= longest:
                width //= 2
        # By name: the frames of a recording may be as many as the tokens by chance.
        cut = lambda name, x: x[:, -width:] if name in TOKENWISE else x
        extra = {name: cut(name, x[rows]) for name, x in self.extra.items()}
        return numpy_prompts(self.tokens[rows][:, -width:], self.mask[rows][:, -width:], extra)

    def all(self) -> Prompts:
        """Return every row, as one batch."""
        return numpy_prompts(self.tokens, self.mask, dict(self.extra))

    def batches(self, config: RunConfig, cursor: int) -> Prompts:
        """Return the rows of one dispatch; see `prompts.stack_batches`."""
        if config.steps_per_call > 1 and self.buckets > 1:
            raise UserError("--steps-per-call above 1 needs rows of one width: --buckets 1")
        return stack_batches(self.batch, config, cursor, config.batch_size)


@dataclass(frozen=True)
class NoisyRows:
    """Labelled texts with new word noise at each draw; see `add_word_noise`."""

    texts: Sequence[str]
    labels: Float32[np.ndarray, "N"]
    encode: Encode
    length: int
    eos: int
    drop: float = 0.0
    swap: float = 0.0

    def batch(self, config: Config, cursor: int) -> Prompts:
        """Return the batch at a cursor, a function of (seed, cursor) alone."""
        units = batch_indices(
            len(self.texts), cursor=cursor, batch_size=config.batch_size, seed=config.seed
        )
        rng = np.random.default_rng([config.seed, cursor])
        texts = [
            add_word_noise(self.texts[int(i)], rng, drop=self.drop, swap=self.swap) for i in units
        ]
        return labelled(texts, self.labels[units], self.encode, self.length, eos=self.eos).all()

    def batches(self, config: RunConfig, cursor: int) -> Prompts:
        """Return the rows of one dispatch; see `prompts.stack_batches`."""
        return stack_batches(self.batch, config, cursor, config.batch_size)


def identity(source: BatchSource) -> str:
    """Return a hash of the data that a source draws from; "" for a source of another
    class than those of `jaxppo.data`.
    """
    if isinstance(source, NoisyRows):
        texts = json.dumps(list(source.texts))
        arrays = {"texts": np.frombuffer(texts.encode(), np.uint8), "labels": source.labels}
    elif isinstance(source, PromptSet | Rows):
        arrays = {**source.extra, "tokens": source.tokens, "mask": source.mask}
    else:
        return ""
    found = hashlib.sha256(source.columns.encode() if isinstance(source, PromptSet) else b"")
    for name, x in sorted(arrays.items()):
        array = np.ascontiguousarray(x)
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def from_ids(
    ids: Sequence[Sequence[int]],
    length: int,
    *,
    learned: Sequence[int] | None = None,
    **extra: np.ndarray,
) -> Rows:
    """Return the last `length` ids of each; the last `learned` (or all) weigh 1."""
    kept = [list(own)[-length:] for own in ids]
    if [] in kept:
        raise UserError(f"text {kept.index([]) + 1} has no tokens")
    tokens, mask = pad_left(kept, length, 0)
    weight = mask.copy()
    if learned is not None:
        weight &= np.arange(length)[None] >= length - np.asarray(learned)[:, None]
    extra = {"weight": weight.astype(np.float32), **extra}
    return Rows(tokens.astype(np.int32), mask, extra)


def pack(
    texts: Sequence[str], encode: Encode, length: int, *, eos: int, start: Start = None
) -> Rows:
    """Return all texts, each between `start` and the end of text, in one stream cut
    into full rows. Where `start` is the end of the text before, it is there once.
    """
    head, stream = as_ids(start), []
    for text in texts:
        begun = stream[len(stream) - len(head) :] == head
        stream += [*([] if begun else head), *without_start(encode(text), head), eos]
    number = len(stream) // length
    if not number:
        raise UserError(f"the texts have {len(stream)} tokens, too few for one row of {length}")
    tokens = np.asarray(stream[: number * length], np.int32).reshape(number, length)
    return Rows(tokens, np.ones_like(tokens, bool), {"weight": np.ones(tokens.shape, np.float32)})


def inside(encode: Encode) -> Encode:
    """Return what encodes a text inside a row: without the space that a tokenizer of
    SentencePiece's kind puts before every text.
    """
    for anchor in ("\n", "=", "."):
        before, both = encode(anchor), encode(f"{anchor}a")
        if before and both[: len(before)] == before and both[len(before) :] != encode("a"):
            break
    else:
        return encode

    def encode_inside(text: str) -> list[int]:
        ids = encode(anchor + text)
        return ids[len(before) :] if ids[: len(before)] == before else encode(text)

    return encode_inside


def responses(
    pairs: Sequence[tuple[str, str]],
    encode: Encode,
    length: int,
    *,
    eos: int,
    longest: int | None = None,
    start: Start = None,
) -> Rows:
    """Return (prompt, response) pairs; only the response and its end have weight. The
    two are encoded apart, as in a rollout, where the prompt ends before anything is
    sampled: no token reaches over the border. A prompt that is too long loses its
    beginning. `longest` bounds a response with its
    end (L - 1 by default), and reserves as much room after each prompt; a longer one is
    cut and has no end.
    """
    most = length - 1 if longest is None else longest
    head = as_ids(start)
    reserved = 0 if longest is None else longest
    encode_response = inside(encode)
    ids, learned = [], []
    for prompt, response in pairs:
        own = [*encode_response(response), eos][:most]
        room = max(length - max(len(own), reserved) - len(head), 0)
        asked = without_start(encode(prompt), head)
        ids.append([*head, *asked[max(len(asked) - room, 0) :], *own])
        learned.append(len(own))
    return from_ids(ids, length, learned=learned)


def preferences(
    triples: Sequence[tuple[str, str, str]], encode: Encode, length: int, **options: Any
) -> Rows:
    """Return (prompt, better response, worse response) as pairs of rows; options as in
    `responses`. `longest` cuts both: a policy's length must not give it away.
    """
    flat = [(prompt, response) for prompt, better, worse in triples for response in (better, worse)]
    return replace(responses(flat, encode, length, **options), unit=2)


def labelled(
    texts: Sequence[str],
    labels: Float32[np.ndarray, "N"],
    encode: Encode,
    length: int,
    *,
    eos: int,
    start: Start = None,
) -> Rows:
    """Return texts with the probability that each is positive."""
    head = as_ids(start)
    first = lambda text: [*head, *without_start(encode(text), head)][: length - 1]
    ids = [[*first(text), eos] for text in texts]
    return from_ids(ids, length, label=np.asarray(labels, np.float32))


def train_validation_split(
    texts: Sequence[str], share: float, *, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Return the numbers of training and validation texts, by a hash of the text:
    copies go to the same side, and a text stays there when others are added. Raises
    UserError when a side is empty.
    """
    training, validation = [], []
    for number, text in enumerate(texts):
        digest = hashlib.sha256(f"{seed} {_normalise(text)}".encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") < share * 2**64
        (validation if held_out else training).append(number)
    if not training or not validation:
        raise UserError(
            f"{len(texts)} texts are too few to hold {share:.0%} of them out; "
            f"give {round(5 / share)} or more"
        )
    return training, validation


def split_in_three(texts: Sequence[str]) -> tuple[list[int], list[int], list[int]]:
    """Return the numbers of training, validation and test texts by
    `train_validation_split`: about 81, 9 and 10 %.
    """
    rest, test = train_validation_split(texts, 0.1)
    training, validation = train_validation_split([texts[i] for i in rest], 0.1, seed=1)
    return [rest[i] for i in training], [rest[i] for i in validation], test


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def add_word_noise(
    text: str, rng: np.random.Generator, *, drop: float = 0.0, swap: float = 0.0
) -> str:
    """Leave out each word but the first with probability `drop`, and swap neighbours
    with probability `swap` (Wei & Zou 2019, https://arxiv.org/abs/1901.11196).
    """
    words = [word for i, word in enumerate(text.split()) if i == 0 or rng.random() >= drop]
    i = 0
    while i + 1 < len(words):
        if rng.random() < swap:
            words[i], words[i + 1] = words[i + 1], words[i]
            i += 1
        i += 1
    return " ".join(words)
