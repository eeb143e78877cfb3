"""Prompts of a user, in any of the usual forms, as columns."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np

from jaxppo.data import jsonl
from jaxppo.data.prompts import PromptSet, TokenizerLike, as_ids, encode
from jaxppo.errors import UserError

Messages = Sequence[Mapping[str, str]]
ROW = "row"  # extra["row"]: the number of the data's row
# what the step reads of `extra`
TAKEN = ("prompt", ROW, "max_tokens", "task", "context", "hint_tokens", "hint_mask")


class ChatTokenizer(TokenizerLike, Protocol):
    """A tokenizer that can also render a chat."""

    def apply_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> str: ...


def read_columns(prompts: Any) -> dict[str, list]:
    """Return the columns of the data, "prompt" first.

    Args:
      prompts: texts; chats, each a list of {"role": ..., "content": ...}; dicts with
        "prompt" (a text or a chat) and further columns; a `datasets.Dataset`; or the
        path of a .jsonl file of such dicts. A column that some rows lack is None there.

    Raises UserError, with the row's number, for anything else.
    """
    rows = _rows(prompts)
    if not rows:
        raise UserError("there are no prompts; give at least one")
    names = list(dict.fromkeys(["prompt", *(name for row in rows for name in row)]))
    return {name: [row.get(name) for row in rows] for name in names}


def _rows(prompts: Any) -> list[dict[str, Any]]:
    if isinstance(prompts, str | Path):
        if isinstance(prompts, str) and not prompts.endswith((".jsonl", ".jsonl.gz")):
            raise UserError(
                f"prompts={prompts[:60]!r} is one text; give a list of prompts, or a .jsonl file"
            )
        return read_file(prompts)
    kind = type(prompts).__name__
    if not isinstance(prompts, Iterable):
        raise UserError(f"prompts are a {kind}; give a list, or a .jsonl file")
    # iterating gives the names of columns, or of parts of a data set
    if isinstance(prompts, Mapping) or hasattr(prompts, "columns"):
        names = ", ".join(str(name)[:40] for name in list(prompts)[:5]) or "nothing"
        raise UserError(
            f"prompts are a {kind} of {names}, not rows; give a list of dicts with 'prompt', or "
            "one part of a data set, such as data['train']"
        )
    if isinstance(prompts, Set):
        raise UserError(f"prompts are a {kind}, which has no order; give a list, such as sorted()")
    rows = [dict(row) if isinstance(row, Mapping) else {"prompt": row} for row in prompts]
    for number, row in enumerate(rows):
        if problem := _problem(row.get("prompt")):
            raise UserError(f"prompt {number} {problem}")
    return rows


def read_file(
    path: str | Path, *, bad_lines: Literal["strict", "skip"] = "strict", max_bad: int = 10
) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file of prompts. A line without a prompt is an
    error or, with `bad_lines` "skip", left out like lines that are not JSON
    (`jsonl.read`).
    """
    check = lambda row: (
        "" if not (problem := _problem(row.get("prompt"))) else f"'prompt' {problem}"
    )
    return [row for _, row in jsonl.read(path, errors=bad_lines, max_bad=max_bad, check=check)]


def _problem(prompt: Any) -> str:
    """What is wrong with a prompt, or ""."""
    if isinstance(prompt, str):
        return "" if prompt.strip() else "is empty"
    if isinstance(prompt, Sequence | np.ndarray) and len(prompt):
        good = lambda x: (
            isinstance(x, Mapping) and isinstance(x.get("content"), str) and x.get("role")
        )
        if all(map(good, prompt)):
            own = prompt[-1]["role"] == "assistant"
            return "ends with the assistant's message; end it with the user's" if own else ""
        return 'is no chat; each message is {"role": "user", "content": "..."}'
    found = "missing" if prompt is None else f"a {type(prompt).__name__}"
    return f"is {found}; give a text, or a chat as a list of messages"


def render(prompt: str | Messages, tokenizer: ChatTokenizer) -> str:
    """Return the text that the model reads: a text as it is, a chat in the checkpoint's
    format with the beginning of the answer.
    """
    return prompt if isinstance(prompt, str) else tokenizer.apply_chat(list(prompt))


def encode_columns(
    columns: Mapping[str, Sequence[Any]],
    tokenizer: ChatTokenizer,
    length: int,
    *,
    too_long: Literal["drop", "last", "error"] = "drop",
    start: int | Sequence[int] | None = None,
    extra: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> PromptSet:
    """Encode the prompts; `extra["row"]` has the number of each one's row.

    `length`: tokens of a prompt; 0 takes that of the longest. `start`: token ids to
    put before each text; a chat's template has its own. `extra`: more arrays [N ...].
    """
    texts = [render(prompt, tokenizer) for prompt in columns["prompt"]]
    started = [isinstance(prompt, str) for prompt in columns["prompt"]]
    start = start if any(started) else None
    if not length:
        length = longest(texts, tokenizer) + len(as_ids(start))
    rows = np.arange(len(texts), dtype=np.int32)
    options = {"too_long": too_long, "start": start, "started": started}
    found = encode(texts, tokenizer, length, extra={**extra, ROW: rows}, **options)
    return found._replace(columns=hash_columns(columns))


def read_numbers(
    columns: Mapping[str, Sequence[Any]],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(the columns of numbers, or of arrays of one shape, as arrays [N ...] that fit
    into 32 bits; of the other columns, why they are none).
    """
    found, problems = {}, {}
    for name, values in columns.items():
        rows = [_as_array(x) for x in values]
        arrays = [x for x in rows if x is not None]
        shapes = {x.shape for x in arrays}
        if name in TAKEN:
            problems[name] = "has a name with another meaning; rename it"
        elif len(arrays) < len(rows):
            row = next(row for row, x in enumerate(rows) if x is None)
            problems[name] = f"has no number of 32 bits in row {row}"
        elif len(shapes) > 1:
            problems[name] = f"has arrays of different shapes, {' and '.join(map(str, shapes))}"
        else:
            array = np.stack(arrays)  # of int32 and float32 it is float64
            found[name] = array.astype(np.float32) if array.dtype.itemsize > 4 else array
    return found, problems


def _as_array(x: Any) -> np.ndarray | None:
    """A number or an array of them with at most 32 bits, or None."""
    try:
        array = np.asarray(x)
    except ValueError:  # lists of different lengths
        return None
    small = {"i": np.int32, "u": np.int32, "f": np.float32, "b": np.bool_}.get(array.dtype.kind)
    if small is None or array.dtype.itemsize <= 4:
        return None if small is None else array
    with np.errstate(over="ignore"):
        found = array.astype(small)
    return found if array.dtype.kind == "f" or (found == array).all() else None


def with_hints(
    prompts: PromptSet,
    columns: Mapping[str, Sequence[Any]],
    tokenizer: ChatTokenizer,
    *,
    start: int | Sequence[int] | None = None,
) -> PromptSet:
    """Add what a teacher reads: the whole prompts with the column "hint" in front, as
    it is; in a chat, in front of the last message. They are extra["hint_tokens"]
    [N P'] and extra["hint_mask"]. A row without a hint has the prompt alone.
    """
    rows = prompts.extra[ROW].tolist()
    hints = [columns["hint"][row] or "" for row in rows]
    if wrong := [row for row, hint in zip(rows, hints, strict=True) if not isinstance(hint, str)]:
        raise UserError(f"the hint of prompt {wrong[0]} is no text")
    pairs = zip(hints, (columns["prompt"][row] for row in rows), strict=True)
    texts = {"prompt": [_with_hint(hint, prompt) for hint, prompt in pairs]}
    found = encode_columns(texts, tokenizer, 0, start=start)
    extra = {"hint_tokens": found.tokens, "hint_mask": found.mask}
    return prompts._replace(extra={**prompts.extra, **extra})


def _with_hint(hint: str, prompt: str | Messages) -> str | Messages:
    if isinstance(prompt, str):
        return hint + prompt
    return [*prompt[:-1], {**prompt[-1], "content": hint + prompt[-1]["content"]}]


def hash_columns(columns: Mapping[str, Sequence[Any]]) -> str:
    """Return a hash of the columns; of values that are not JSON, only types count."""
    plain = lambda x: x.tolist() if isinstance(x, np.ndarray | np.generic) else type(x).__name__

    def text(values: Sequence[Any]) -> str:
        try:  # keys that are not JSON do not count
            return json.dumps(list(values), default=plain, skipkeys=True)
        except (ValueError, RecursionError):  # a value that holds itself
            return json.dumps([type(x).__name__ for x in values])

    texts = {str(name): text(values) for name, values in columns.items()}
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]


def longest(texts: Sequence[str], tokenizer: TokenizerLike) -> int:
    """Return the number of tokens of the longest text."""
    return max(len(tokenizer.encode(text)) for text in texts)
