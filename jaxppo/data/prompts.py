"""Encode prompts and draw batches of them in a reproducible order."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import numpy as np
from jaxtyping import Bool, Int, Int64

from jaxppo.config import Config, RunConfig
from jaxppo.errors import UserError
from jaxppo.parallel import processes
from jaxppo.types import Prompts

TooLong = Literal["drop", "first", "last", "error"]


class TokenizerLike(Protocol):
    """The part of a tokenizer that this module uses."""

    @property
    def pad_id(self) -> int: ...

    @property
    def start_id(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


class BatchSource(Protocol):
    """Gives the batches of a run: `PromptSet`, `rows.Rows`, or your own."""

    def batches(self, config: RunConfig, cursor: int) -> Prompts: ...


class PromptSet(NamedTuple):
    """All prompts of a data set, encoded."""

    tokens: Int[np.ndarray, "N P"]  # padded on the left
    mask: Bool[np.ndarray, "N P"]  # True on the prompt's own tokens
    # [N ...] each: references, labels, task ids, features
    extra: Mapping[str, np.ndarray] = MappingProxyType({})
    columns: str = ""  # a hash of what a reward on the host reads of the rows

    def batch(self, config: Config, cursor: int) -> Prompts:
        """Return the batch of (seed, cursor) alone; copies of a prompt are adjacent."""
        prompts = config.rows // config.group_size
        chosen = batch_indices(
            len(self.tokens), cursor=cursor, batch_size=prompts, seed=config.seed
        ).repeat(config.group_size)
        extra = {name: x[chosen] for name, x in self.extra.items()}
        return numpy_prompts(self.tokens[chosen], self.mask[chosen], extra)

    def batches(self, config: RunConfig, cursor: int) -> Prompts:
        """Return the prompts of one dispatch; see `stack_batches`."""
        return stack_batches(self.batch, config, cursor, config.rows // config.group_size)

    def in_order(self, size: int, *, copies: int = 1) -> Iterator[Prompts]:
        """Yield all prompts once, or so many adjacent copies of each, in batches of
        `size` rows; the last prompt fills up the last batch. `index` counts the rows.
        """
        for start in range(0, len(self.tokens) * copies, size):
            index = np.arange(start, start + size, dtype=np.int32)
            rows = np.minimum(index // copies, len(self.tokens) - 1)
            extra = {name: x[rows] for name, x in self.extra.items()}
            yield numpy_prompts(self.tokens[rows], self.mask[rows], extra, index=index)


def numpy_prompts(
    tokens: Any, mask: Any, extra: Mapping[str, Any], *, index: Any = None
) -> Prompts:
    """Return Prompts of NumPy arrays; `index` is 0, 1, 2, ... by default."""
    index = np.arange(len(tokens), dtype=np.int32) if index is None else index
    return Prompts(tokens, mask, index, extra)


def stack_batches(
    batch: Callable[[Config, int], Prompts], config: RunConfig, cursor: int, batch_size: int
) -> Prompts:
    """Return the batch at a cursor, or stack `steps_per_call` successive ones."""
    if config.steps_per_call == 1:
        return batch(config, cursor)
    found = [batch(config, cursor + k * batch_size) for k in range(config.steps_per_call)]
    return jax.tree.map(lambda *x: np.stack(x), *found)


def encode(
    texts: Sequence[str],
    tokenizer: TokenizerLike,
    length: int,
    *,
    extra: Mapping[str, np.ndarray] | None = None,
    too_long: TooLong = "drop",
    start: int | Sequence[int] | None = None,
    started: Sequence[bool] | None = None,
) -> PromptSet:
    """Encode prompts and pad them on the left to `length` tokens.

    With `too_long` "drop" longer prompts are left out and counted in a printed line;
    "first" and "last" keep that end of them. `start` are token ids to put before each
    prompt that does not begin with them, and never cut off; `started` says which
    prompts, all by default. `extra` holds arrays [N ...]. Raises UserError for a prompt
    without tokens, an id outside the vocabulary, a prompt that is too long ("error"),
    or when none fits.
    """
    if too_long not in get_args(TooLong):
        raise UserError(f"too_long {too_long!r}: choose one of {', '.join(get_args(TooLong))}")
    head = as_ids(start)
    room = length - len(head)
    if room < 1:
        raise UserError(
            f"a prompt length of {length} leaves no room for a prompt; use at least {1 + len(head)}"
        )
    heads = [head] * len(texts) if started is None else [head if own else [] for own in started]
    pairs = zip(texts, heads, strict=True)
    ids = [without_start(tokenizer.encode(text), own) for text, own in pairs]
    rooms = [length - len(own) for own in heads]
    for number, own in enumerate(ids):
        if not own:
            raise UserError(f"prompt {number} has no tokens ({texts[number]!r}); remove it")
        if len(own) > rooms[number] and too_long == "error":
            raise UserError(
                f"prompt {number} has {len(own)} tokens, but {rooms[number]} fit; "
                "raise the prompt length or shorten it"
            )
    kept = [n for n, own in enumerate(ids) if too_long != "drop" or len(own) <= rooms[n]]
    if not kept:
        most = f"; the longest has {max(map(len, ids))} tokens" if ids else ""
        raise UserError(
            f"none of {len(texts)} prompts fits in {room} tokens{most}; raise the prompt length"
        )
    if len(kept) < len(texts) and processes.is_main():
        dropped = len(texts) - len(kept)
        print(
            f"{dropped} of {len(texts)} prompts are longer than {length} tokens and were left out"
        )
    cut = lambda n: slice(-rooms[n], None) if too_long == "last" else slice(rooms[n])
    whole = [heads[n] + ids[n][cut(n)] for n in kept]
    tokens, mask = pad_left(whole, length, tokenizer.pad_id)
    _check_ids(tokens, kept, tokenizer)
    extra = {name: np.asarray(x)[kept] for name, x in (extra or {}).items()}
    return PromptSet(tokens.astype(np.int32), mask, extra)


def as_ids(start: int | Sequence[int] | None) -> list[int]:
    """Return the token ids that begin each text."""
    return [] if start is None else [start] if isinstance(start, int) else list(start)


def without_start(ids: list[int], start: list[int]) -> list[int]:
    """Return the ids without `start`, if they begin with it: a text may have its own.

    >>> without_start([1, 5, 6], [1]), without_start([5, 6], [1])
    ([5, 6], [5, 6])
    """
    own = bool(start) and len(ids) > len(start) and ids[: len(start)] == start
    return ids[len(start) :] if own else ids


def pad_left(
    ids: Sequence[Sequence[int]], length: int, pad: int
) -> tuple[Int64[np.ndarray, "N P"], Bool[np.ndarray, "N P"]]:
    """Return lists of token ids as (tokens, mask), padded on the left."""
    tokens = np.full((len(ids), length), pad, np.int64)
    mask = np.zeros((len(ids), length), bool)
    for row, own in enumerate(ids):
        tokens[row, length - len(own) :] = own
        mask[row, length - len(own) :] = True
    return tokens, mask


def _check_ids(tokens: np.ndarray, kept: list[int], tokenizer: TokenizerLike) -> None:
    """Check ids: an embedding reads another row for -1 and gives NaN for V."""
    size = tokenizer.vocab_size
    # Padding is embedded too, and fills responses even where no prompt needs it.
    if not 0 <= tokenizer.pad_id < size:
        raise UserError(
            f"the padding id {tokenizer.pad_id} is outside the vocabulary of {size}; set another"
        )
    bad = (tokens < 0) | (tokens >= size)
    if bad.any():
        row = int(np.argmax(bad.any(axis=1)))
        raise UserError(
            f"prompt {kept[row]} has the token id {int(tokens[row][bad[row]][0])}, outside the "
            f"vocabulary of {size}; use the model's own tokenizer"
        )


def epoch_order(seed: int, epoch: int, n: int) -> Int64[np.ndarray, "n"]:
    """Return a permutation of n prompts that depends on the arguments alone.

    >>> epoch_order(0, 0, 5).tolist(), epoch_order(0, 1, 5).tolist()
    ([3, 2, 1, 0, 4], [4, 1, 2, 0, 3])
    """
    # NumPy promises the same raw stream of a bit generator in all versions, but not the
    # same `permutation`.
    raw = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(n)
    return np.argsort(np.asarray(raw, np.uint64), kind="stable").astype(np.int64)


def batch_indices(n: int, *, cursor: int, batch_size: int, seed: int) -> Int64[np.ndarray, "B"]:
    """Return the rows of the batch at a cursor, the number of prompts used before.
    Prompt number c of the run is epoch_order(seed, c // n, n)[c % n]: every prompt
    comes once an epoch, and a batch may span two epochs.
    """
    if n < 1 or cursor < 0:
        raise UserError(
            f"cannot take a batch from {n} prompts at position {cursor}; give at least one prompt"
        )
    position = np.arange(cursor, cursor + batch_size, dtype=np.int64)
    epochs = {int(epoch): epoch_order(seed, int(epoch), n) for epoch in np.unique(position // n)}
    return np.asarray([epochs[int(c) // n][int(c) % n] for c in position], np.int64)


def format_prompt(config: RunConfig, fields: Mapping[str, Any]) -> str:
    """Fill the run's `prompt_format` with texts. Raises UserError for a missing one."""
    try:
        return fill(config.prompt_format, fields)
    except KeyError as missing:
        raise UserError(
            f"the run's prompt format {config.prompt_format!r} needs {missing}; "
            "give it with --file PROMPTS.jsonl"
        ) from None


def fill(pattern: str, fields: Mapping[str, Any]) -> str:
    """Replace each {name} by the text field of that name. Raises KeyError if there is
    none.

    Other braces stay. Unlike `str.format`, nothing reads attributes: a pattern may be
    from a stranger's settings.

    >>> fill("{prompt} {} =", {"prompt": "1 {x} 2"})
    '1 {x} 2 {} ='
    """
    texts = {name: x for name, x in fields.items() if isinstance(x, str)}
    return re.sub(r"\{(\w+)\}", lambda found: texts[found[1]], pattern)


def start_token(config: RunConfig, tokenizer: TokenizerLike) -> int | tuple[int, ...] | None:
    """Return the id or ids that every prompt of the run begins with, or None."""
    if config.start is not None:
        return config.start or None
    return tokenizer.start_id if config.prompt_start else None


def truncation_note(texts: Sequence[str], tokenizer: TokenizerLike, room: int) -> str:
    """Say how many texts have more than `room` tokens; empty for none."""
    long = sum(len(tokenizer.encode(text)) > room for text in texts)
    have, their = ("has", "its") if long == 1 else ("have", "their")
    limit = f"more than {room} tokens (--prompt-length of the run)"
    return f"{long} of {len(texts)} prompts {have} {limit} and lost {their} beginning" * (long > 0)
