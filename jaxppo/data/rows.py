"""Texts for the supervised stages: rows of tokens with weights, packed or one text a
row, in pairs, by length, with noise.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from jaxppo.config import Config, RunConfig
from jaxppo.data.prompts import indices
from jaxppo.errors import UserError
from jaxppo.types import Prompts

Encode = Callable[[str], list[int]]
TOKENWISE = (
    "weight",
)  # parts of `extra` with a number for each token, which are as wide as the tokens


@dataclass(frozen=True)
class Rows:
    """Rows for `supervised.py`, dealt in an order that hangs on (seed, cursor) alone.
    The cursor counts rows.

    With `buckets` > 1 the rows of that many batches are sorted by length, so that each
    batch is as short as its own longest row allows (to the next power of two): less
    padding, and a program for each width.
    """

    tokens: Int32[np.ndarray, "N L"]  # padded on the left
    mask: Bool[np.ndarray, "N L"]
    extra: dict[str, Any] = field(default_factory=dict)  # [N ...]
    unit: int = 1  # rows that belong together: 2 of a pair
    buckets: int = 1

    def __len__(self) -> int:
        return len(self.tokens) // self.unit

    def take(self, units: Int64[np.ndarray, "n"]) -> "Rows":
        """Some of the units, in this order."""
        rows = self._rows(np.asarray(units))
        return Rows(
            self.tokens[rows],
            self.mask[rows],
            {k: x[rows] for k, x in self.extra.items()},
            self.unit,
            self.buckets,
        )

    def _rows(self, units: np.ndarray) -> np.ndarray:
        return (units[:, None] * self.unit + np.arange(self.unit)[None]).reshape(-1)

    def batch(self, config: Config, cursor: int) -> Prompts:
        """The batch that starts at a cursor; NumPy arrays."""
        most = config.batch_size // self.unit
        if config.batch_size % self.unit:
            raise UserError(f"--batch-size {config.batch_size} must be even: rows come in pairs")
        window, place = divmod(cursor // config.batch_size, self.buckets)
        start = window * self.buckets * most
        units = indices(len(self), cursor=start, batch_size=self.buckets * most, seed=config.seed)
        if self.buckets > 1:
            lengths = self.mask.sum(1).reshape(-1, self.unit).max(1)
            units = units[np.argsort(lengths[units], kind="stable")]
            place = np.random.default_rng([config.seed, window]).permutation(self.buckets)[place]
        rows = self._rows(units[place * most : (place + 1) * most])
        width = (
            self._width(int(self.mask[rows].sum(1).max()))
            if self.buckets > 1
            else self.tokens.shape[1]
        )
        cut = lambda x: x[rows][:, -width:]
        # By name: another part's second dimension may be as long by chance (the frames
        # of a recording).
        extra = {name: cut(x) if name in TOKENWISE else x[rows] for name, x in self.extra.items()}
        index: Any = np.arange(len(rows), dtype=np.int32)
        return Prompts(cut(self.tokens), cut(self.mask), index, extra)

    def all(self) -> Prompts:
        """Every row, as one batch."""
        index: Any = np.arange(len(self.tokens), dtype=np.int32)
        return Prompts(self.tokens, self.mask, index, dict(self.extra))  # type: ignore[arg-type]

    def _width(self, longest: int) -> int:
        """The narrowest of the widths L, L / 2, L / 4, ... that the longest row fits
        into.
        """
        width = self.tokens.shape[1]
        while width % 2 == 0 and width // 2 >= max(longest, 2):
            width //= 2
        return width

    def call(self, config: RunConfig, cursor: int) -> Prompts:
        """The rows of one dispatch: a batch, or steps_per_call batches with a leading
        dimension.
        """
        if config.steps_per_call > 1 and self.buckets > 1:
            raise UserError("--steps-per-call above 1 wants rows of one width: --buckets 1")
        return _dispatch(self.batch, config, cursor)


@dataclass(frozen=True)
class Noisy:
    """Labelled texts dealt as `Rows` are, whose words are left out and exchanged anew
    each time (`noisy`).
    """

    texts: Sequence[str]
    labels: Float32[np.ndarray, "N"]
    encode: Encode
    length: int
    eos: int
    drop: float = 0.0
    swap: float = 0.0

    def batch(self, config: Config, cursor: int) -> Prompts:
        """The batch that starts at a cursor; the same each time it is asked for."""
        units = indices(
            len(self.texts), cursor=cursor, batch_size=config.batch_size, seed=config.seed
        )
        rng = np.random.default_rng([config.seed, cursor])
        texts = [noisy(self.texts[int(i)], rng, drop=self.drop, swap=self.swap) for i in units]
        return labelled(texts, self.labels[units], self.encode, self.length, eos=self.eos).all()

    def call(self, config: RunConfig, cursor: int) -> Prompts:
        """The rows of one dispatch, as those of `Rows`."""
        return _dispatch(self.batch, config, cursor)


def _dispatch(batch: Callable[[Config, int], Prompts], config: RunConfig, cursor: int) -> Prompts:
    if config.steps_per_call == 1:
        return batch(config, cursor)
    batches = [batch(config, cursor + k * config.batch_size) for k in range(config.steps_per_call)]
    return Prompts(
        *(
            _stacked([getattr(b, name) for b in batches])
            for name in ("tokens", "mask", "index", "extra")
        )
    )


def _stacked(parts: list) -> Any:
    return (
        {k: np.stack([p[k] for p in parts]) for k in parts[0]}
        if isinstance(parts[0], dict)
        else np.stack(parts)
    )


def padded(
    ids: Sequence[Sequence[int]],
    length: int,
    *,
    learned: Sequence[int] | None = None,
    unit: int = 1,
    **extra: np.ndarray,
) -> Rows:
    """Rows from lists of ids, the last `length` of each; `learned`: how many at the end
    of each have weight 1 (all).
    """
    tokens, mask = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), bool)
    weight = np.zeros((len(ids), length), np.float32)
    for row, own in enumerate(ids):
        kept = list(own)[-length:]
        if not kept:
            raise UserError(f"text {row + 1} has no tokens")
        tokens[row, length - len(kept) :] = kept
        mask[row, length - len(kept) :] = True
        weight[row, length - min(len(kept), len(own) if learned is None else learned[row]) :] = 1
    return Rows(tokens, mask, {"weight": weight, **extra}, unit)


def packed(texts: Sequence[str], encode: Encode, length: int, *, eos: int) -> Rows:
    """Plain text for language modelling: all texts one after the other, each ended, cut
    into full rows (the rest is dropped).
    """
    stream = [token for text in texts for token in (*encode(text), eos)]
    number = len(stream) // length
    if not number:
        raise UserError(f"the texts have {len(stream)} tokens, too few for one row of {length}")
    tokens = np.asarray(stream[: number * length], np.int32).reshape(number, length)
    return Rows(tokens, np.ones_like(tokens, bool), {"weight": np.ones(tokens.shape, np.float32)})


def documents(
    texts: Sequence[str], encode: Encode, length: int, *, eos: int, start: int | None = None
) -> Rows:
    """One text a row: the first `length` tokens, ended where there is room; `start`
    stands before each when it is given.
    """
    head = [] if start is None else [start]
    ids = [[*head, *encode(text), eos][:length] for text in texts]
    return padded(ids, length, learned=[len(own) - len(head) for own in ids])


def replies(
    pairs: Sequence[tuple[str, str]],
    encode: Encode,
    length: int,
    *,
    eos: int,
    longest: int | None = None,
    start: int | None = None,
) -> Rows:
    """Prompts with responses for fine-tuning: the loss is on the response and its end,
    `longest` tokens at most (one that is cut has no end to learn); `start` stands
    before each prompt when it is given; a prompt too long loses its beginning: with
    `longest`, where it has more than the length without that, as a policy's prompts
    do.
    """
    most = length - 1 if longest is None else longest
    head = [] if start is None else [start]
    kept = 0 if longest is None else longest
    ids, learned = [], []
    for prompt, response in pairs:
        own = [*encode(response), eos][:most]
        room = max(length - max(len(own), kept) - len(head), 0)
        asked = encode(prompt)
        ids.append([*head, *asked[len(asked) - min(room, len(asked)) :], *own])
        learned.append(len(own))
    return padded(ids, length, learned=learned)


def preferences(
    triples: Sequence[tuple[str, str, str]],
    encode: Encode,
    length: int,
    *,
    eos: int,
    longest: int | None = None,
) -> Rows:
    """(prompt, better response, worse response) as pairs of rows, for reward models and
    DPO. `longest` cuts both alike: where one of a pair is a policy's, its length must
    not tell.
    """
    flat = [(prompt, response) for prompt, better, worse in triples for response in (better, worse)]
    rows = replies(flat, encode, length, eos=eos, longest=longest)
    return Rows(rows.tokens, rows.mask, rows.extra, unit=2)


def labelled(
    texts: Sequence[str], labels: Float32[np.ndarray, "N"], encode: Encode, length: int, *, eos: int
) -> Rows:
    """Texts with the probability that each is positive."""
    ids = [[*encode(text)[: length - 1], eos] for text in texts]
    return padded(ids, length, label=np.asarray(labels, np.float32))


def deduplicated(texts: Sequence[str]) -> list[int]:
    """Numbers of the texts without later copies; case and white space make no
    difference.

    >>> deduplicated(["A b", "c", "a  B"])
    [0, 1]
    """
    seen: dict[str, int] = {}
    for number, text in enumerate(texts):
        seen.setdefault(" ".join(text.casefold().split()), number)
    return list(seen.values())


def held_out(texts: Sequence[str], share: float, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Numbers of the texts to train on and of those held out, by a hash of the text:
    copies fall on one side, and a text stays where it is when others come or go. Raises
    UserError where one of the two would be empty.
    """
    training, validation = [], []
    for number, text in enumerate(texts):
        digest = hashlib.sha256(f"{seed} {' '.join(text.casefold().split())}".encode()).digest()
        (validation if int.from_bytes(digest[:8], "big") < share * 2**64 else training).append(
            number
        )
    if not training or not validation:
        raise UserError(
            f"{len(texts)} texts are too few to hold {share:.0%} of them out; give {round(5 / share)} or more"
        )
    return training, validation


def noisy(text: str, rng: np.random.Generator, *, drop: float = 0.0, swap: float = 0.0) -> str:
    """The text with each word left out with probability `drop`, and neighbours
    exchanged with probability `swap` (Wei & Zou 2019,
    https://arxiv.org/abs/1901.11196). The first word always stays.
    """
    words = text.split()
    words = [word for i, word in enumerate(words) if i == 0 or rng.random() >= drop]
    i = 0
    while i + 1 < len(words):
        if rng.random() < swap:
            words[i], words[i + 1] = words[i + 1], words[i]
            i += 1
        i += 1
    return " ".join(words)
