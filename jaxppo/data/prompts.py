"""Prompts: read from JSON lines, encoded with padding on the left, and dealt in a
reproducible order.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from jaxppo.config import Config, RunConfig
from jaxppo.data import jsonl
from jaxppo.errors import UserError
from jaxppo.parallel import processes
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.types import Prompts


class Record(NamedTuple):
    """One line of a prompt file."""

    prompt: str
    reference: str | None


class Encoded(NamedTuple):
    """Prompts as token ids."""

    tokens: Int32[np.ndarray, "N P"]  # padded on the left
    mask: Bool[np.ndarray, "N P"]  # True on the prompt's own tokens
    rows: Int64[np.ndarray, "N"]  # the number of each prompt among the texts
    dropped: int  # texts left out because they were too long


class Batch(NamedTuple):
    """The prompts of one step."""

    tokens: Int32[np.ndarray, "B P"]
    mask: Bool[np.ndarray, "B P"]
    rows: Int64[np.ndarray, "B"]  # their rows in the whole set


@runtime_checkable
class TokenizerLike(Protocol):
    """What encoding needs of a tokenizer."""

    @property
    def pad_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


def read_jsonl(
    path: str | Path,
    field: str = "prompt",
    reference: str | None = None,
    *,
    errors: Literal["strict", "skip"] = "strict",
    max_bad: int = 10,
) -> list[Record]:
    """Read one JSON object a line: `field` holds the prompt; `reference` names what its
    response is compared with.

    Args:
        path: a file of JSON lines, or the same with gzip under the suffix .gz; blank
        lines are passed over. field: key of the prompt. reference: key of the
        reference. errors: "strict" stops at the first bad line; "skip" passes over bad
        lines and tells their count in a warning. max_bad: most bad lines that "skip"
        passes over.

    Raises:
        UserError: with the line's number, for bad UTF-8 or JSON, a missing or empty
        field, or one that is not a string;
            also for a file that cannot be read or has no prompts. See `jsonl.read`.
    """
    keys = (field,) if reference is None else (field, reference)
    rows = jsonl.read(path, errors=errors, max_bad=max_bad, strings=keys)
    return [Record(row[field], None if reference is None else row[reference]) for _, row in rows]


def encode_rows(
    texts: Sequence[str],
    tokenizer: TokenizerLike,
    length: int,
    *,
    too_long: Literal["drop", "first", "last", "error"] = "drop",
    start: int | None = None,
    vocab_size: int | None = None,
) -> Encoded:
    """Token ids of texts, padded on the left to one length.

    Args:
        texts: [N] prompts. tokenizer: gives token ids. length: P. too_long: a text with
        more than P tokens is left out and counted, cut to its first or last tokens, or
        an error. start: a token id put before each text (and never cut off), such as
        the one that starts a document. vocab_size: V of the model, where it differs
        from the tokenizer's.

    Raises:
        UserError: for a tokenizer with more ids than the model, an id outside the
        vocabulary (the padding's, too), a text
            without tokens, one that is too long where that is an error, or when every
            text is too long.
    """
    vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
    _check_tokenizer(tokenizer, vocab_size)
    head = [] if start is None else [start]
    room = length - len(head)
    if room < 1:
        raise UserError(
            f"a prompt length of {length} leaves no room for a prompt; use at least {1 + len(head)}"
        )
    rows, kept, longest = [], [], 0
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text)
        if not ids:
            raise UserError(f"prompt {number} has no tokens ({text!r}); remove it")
        longest = max(longest, len(ids))
        if len(ids) > room and too_long == "error":
            raise UserError(
                f"prompt {number} has {len(ids)} tokens, but {room} fit; raise the prompt length or shorten it"
            )
        if len(ids) > room and too_long == "drop":
            continue
        rows.append(head + (ids[-room:] if too_long == "last" else ids[:room]))
        kept.append(number)
    if not rows:
        most = f"; the longest has {longest} tokens" if longest else ""
        raise UserError(
            f"none of {len(texts)} prompts fits in {room} tokens{most}; raise the prompt length"
        )
    tokens, mask = _pad_left(rows, length, tokenizer.pad_id)
    _check_ids(tokens, mask, vocab_size)
    return Encoded(
        tokens.astype(np.int32), mask, np.asarray(kept, np.int64), len(texts) - len(rows)
    )


def _pad_left(
    rows: list[list[int]], length: int, pad: int
) -> tuple[Int64[np.ndarray, "N P"], Bool[np.ndarray, "N P"]]:
    tokens = np.full((len(rows), length), pad, np.int64)
    mask = np.zeros((len(rows), length), bool)
    for row, ids in enumerate(rows):
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    return tokens, mask


# An embedding of id -1 wraps to the last row and one of V or more is NaN, both without
# a word: they are caught here.
def _check_tokenizer(tokenizer: TokenizerLike, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocabulary of {vocab_size}; "
            f"use the model's own tokenizer"
        )
    # The padding is embedded, too (and then masked), and it fills up responses even
    # where no prompt needs it.
    if not 0 <= tokenizer.pad_id < vocab_size:
        raise UserError(
            f"the padding id {tokenizer.pad_id} is outside the model's vocabulary of {vocab_size}; set another"
        )


def _check_ids(tokens: np.ndarray, mask: np.ndarray, vocab_size: int) -> None:
    bad = mask & ((tokens < 0) | (tokens >= vocab_size))
    if bad.any():
        row = int(np.argmax(bad.any(axis=1)))
        raise UserError(
            f"prompt {row} has the token id {int(tokens[row][bad[row]][0])}, outside the model's vocabulary of {vocab_size}; "
            f"use the model's own tokenizer"
        )


def order(seed: int, epoch: int, n: int) -> Int64[np.ndarray, "n"]:
    """The order of n prompts in one epoch: a permutation that depends on nothing else.

    >>> order(0, 0, 5).tolist(), order(0, 1, 5).tolist()
    ([3, 2, 1, 0, 4], [4, 1, 2, 0, 3])
    """
    # NumPy promises the same raw stream of a bit generator in all versions, but not the
    # same `permutation`.
    raw = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(n)
    return np.argsort(np.asarray(raw, np.uint64), kind="stable").astype(np.int64)


def indices(n: int, *, cursor: int, batch_size: int, seed: int) -> Int64[np.ndarray, "B"]:
    """The rows of the batch that starts at a cursor: a pure function, so that a resumed
    run sees the same prompts.

    Prompt number c of the run is order(seed, c // n, n)[c % n]: every prompt comes once
    an epoch, and a batch may run over the end of an epoch into the next.

    Args:
        n: prompts in the set.
        cursor: prompts already used in this run.
        batch_size: B.
        seed: of the order.
    """
    if n < 1 or cursor < 0:
        raise UserError(
            f"cannot take a batch from {n} prompts at position {cursor}; give at least one prompt"
        )
    position = np.arange(cursor, cursor + batch_size, dtype=np.int64)
    epochs = {int(epoch): order(seed, int(epoch), n) for epoch in np.unique(position // n)}
    return np.asarray([epochs[int(c) // n][int(c) % n] for c in position], np.int64)


def batch(
    tokens: Int32[np.ndarray, "N P"],
    mask: Bool[np.ndarray, "N P"],
    *,
    cursor: int,
    batch_size: int,
    seed: int,
) -> Batch:
    """The prompts of the batch that starts at a cursor; see `indices`."""
    rows = indices(len(tokens), cursor=cursor, batch_size=batch_size, seed=seed)
    return Batch(tokens[rows], mask[rows], rows)


class Batches(Protocol):
    """What deals the batches: `sampler.PromptSet`, `data.rows.Rows`, or a script's
    own.
    """

    def call(self, config: RunConfig, cursor: int) -> Prompts: ...


class PromptSet(NamedTuple):
    """Encoded prompts, all of them."""

    tokens: Int[np.ndarray, "N P"]
    mask: Bool[np.ndarray, "N P"]  # padding on the left
    extra: Mapping[str, np.ndarray] = MappingProxyType(
        {}
    )  # [N ...] each: references, labels, task ids, features

    def batch(self, config: Config, cursor: int) -> Prompts:
        """The batch that starts at a cursor, the copies of a prompt beside each other;
        a function of (seed, cursor) alone.
        """
        chosen = indices(
            len(self.tokens),
            cursor=cursor,
            batch_size=config.rows // config.group_size,
            seed=config.seed,
        ).repeat(config.group_size)
        rows = np.arange(config.rows, dtype=np.int32)
        return _host_prompts(
            self.tokens[chosen],
            self.mask[chosen],
            rows,
            {name: x[chosen] for name, x in self.extra.items()},
        )

    def call(self, config: RunConfig, cursor: int) -> Prompts:
        """The prompts of one dispatch: a batch, or steps_per_call batches with a
        leading dimension; NumPy arrays.
        """
        prompts = config.rows // config.group_size
        batches = [self.batch(config, cursor + k * prompts) for k in range(config.steps_per_call)]
        return (
            batches[0]
            if config.steps_per_call == 1
            else jax.tree.map(lambda *x: np.stack(x), *batches)
        )


def encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    *,
    extra: Mapping[str, np.ndarray] | None = None,
    **options,
) -> PromptSet:
    """`data.prompts.encode` as a PromptSet; `extra` has one entry for each text, and
    goes with it. Counts what it leaves out.
    """
    encoded = encode_rows(texts, tokenizer, length, **options)
    if encoded.dropped and processes.is_main():
        print(
            f"{encoded.dropped} of {len(texts)} prompts are longer than {length} tokens and were left out"
        )
    return PromptSet(
        encoded.tokens,
        encoded.mask,
        {name: np.asarray(x)[encoded.rows] for name, x in (extra or {}).items()},
    )


def _host_prompts(tokens: Any, mask: Any, index: Any, extra: Any) -> Prompts:
    """Prompts that are still NumPy arrays."""
    return Prompts(tokens, mask, index, extra)


def format_prompt(config: RunConfig, words: Mapping[str, str]) -> str:
    """A prompt as the run was trained on it: its `prompt_format` with these words in
    the places that it names (and nothing else of `str.format`: the settings may be a
    stranger's). Raises UserError for a place without a word.

    >>> put(RunConfig(prompt_format="{prompt}\\n="), {"prompt": "Guten {Tag}"})
    'Guten {Tag}\\n='
    """

    def word(found: re.Match) -> str:
        if found[1] not in words:
            raise UserError(
                f"the run's prompts are {config.prompt_format!r}: give {found[1]!r}, too, with --file PROMPTS.jsonl"
            )
        return words[found[1]]

    return re.sub(r"\{(\w+)\}", word, config.prompt_format)


def start_token(config: RunConfig, tokenizer: Tokenizer) -> int | None:
    """The id that every prompt of the run begins with, if one does."""
    return tokenizer.start_id if config.prompt_start else None


def truncation_note(texts: Sequence[str], tokenizer: Tokenizer, room: int) -> str:
    """A remark on the texts that lose their beginning, since they have more tokens than
    there is room for; empty for none.

    >>> from jaxppo.pretrained.tiny import byte_tokenizer
    >>> (
    ...     cut(["short", "much longer"], byte_tokenizer(), 8),
    ...     cut(["short"], byte_tokenizer(), 8),
    ... )
    ('1 of 2 prompts has more than 8 tokens (--prompt-length of the run) and lost its beginning', '')
    """
    long = sum(len(tokenizer.encode(text)) > room for text in texts)
    words = ("has", "its") if long == 1 else ("have", "their")
    limit = f"more than {room} tokens (--prompt-length of the run)"
    return (
        f"{long} of {len(texts)} prompts {words[0]} {limit} and lost {words[1]} beginning"
        if long
        else ""
    )
