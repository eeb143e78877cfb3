"""Prompts with references, from JSON lines or a hub, split into three parts."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64

from jaxppo.data import jsonl
from jaxppo.errors import UserError, first_line
from jaxppo.parallel import processes

T = TypeVar("T")

FILE_ENDINGS = (".jsonl", ".json", ".gz", ".txt", ".csv")


class Example(NamedTuple):
    """A prompt and the text that its response is compared with."""

    prompt: str
    reference: str
    # what else the task knows: words, the right letter, features
    extra: Mapping[str, Any] = MappingProxyType({})


class Examples(NamedTuple):
    """Three disjoint parts."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


class Split(NamedTuple):
    """Row numbers of three disjoint parts."""

    train: Int64[np.ndarray, "a"]
    validation: Int64[np.ndarray, "b"]
    test: Int64[np.ndarray, "c"]


class HubColumns(NamedTuple):
    """How to read a hub's data set without the columns prompt and reference."""

    read: Callable[[Mapping[str, Any]], Example]
    configuration: str | None = None
    test: str = ""  # the part to test on; "" = some of the part "train"


def load(data: str, columns: HubColumns | None = None) -> Examples:
    """Load a file of JSON lines or a data set from a hub, and split it by prompt.
    `columns` says how to read the hub's.
    """
    path = Path(data).expanduser()
    if path.exists():
        found = read_examples(path)
    elif path.is_absolute() or data.startswith((".", "~")) or data.endswith(FILE_ENDINGS):
        raise UserError(
            f"there is no file {data}; give a file of JSON lines or the id of a data set"
        )
    else:
        found = from_hub(data, columns)
        if columns is not None and columns.test:
            parts = split_examples(found, fractions=(0.95, 0.05))
            return parts._replace(test=from_hub(data, columns, part=columns.test))
    found = drop_duplicates(found, "examples", key=_contents)
    # Recordings all have the same prompt; then the reference tells them apart.
    same_prompt = len({example.prompt for example in found}) == 1
    keys = [example.reference for example in found] if same_prompt else None
    return split_examples(found, keys)


def read_examples(path: str | Path) -> list[Example]:
    """Read lines {"prompt": "...", "reference": "..."}; other keys go into `extra`.
    With "context" the prompt may be empty. Raises UserError with the line's number.
    """
    examples = []
    for line, row in jsonl.read(path, strings=("reference",)):
        prompt, wrong = row.get("prompt"), ""
        if not isinstance(prompt, str):
            wrong = "is missing" if prompt is None else f"is {prompt!r}, not a string"
        elif not prompt.strip() and "context" not in row:
            wrong = "is empty"
        if wrong:
            raise UserError(f"{path}, line {line}: 'prompt' {wrong}")
        examples.append(_example(row))
    return examples


def drop_duplicates(
    items: Sequence[T], what: str, *, key: Callable[[T], Hashable] = lambda x: x
) -> list[T]:
    """Return the items without exact copies of earlier ones, and print how many of
    them, `what`, there are.

    >>> drop_duplicates([("a", "b"), ("A", "b"), ("a", "b")], "pairs")
    1 of 3 pairs is an exact copy of another and was left out
    [('a', 'b'), ('A', 'b')]
    """
    first: dict[Hashable, T] = {}
    for item in items:
        first.setdefault(key(item), item)
    kept = list(first.values())
    copies = len(items) - len(kept)
    if copies and processes.is_main():
        words = ("is an exact copy of another and was", "are exact copies of others and were")
        print(f"{copies} of {len(items)} {what} {words[copies > 1]} left out")
    return kept


def _contents(example: Example) -> tuple[str, str, str]:
    """All that is in an example; an object that is no JSON is like no other."""
    extra = json.dumps(dict(example.extra), sort_keys=True, default=id)
    return example.prompt, example.reference, extra


def _example(row: dict[str, Any]) -> Example:
    extra = {key: x for key, x in row.items() if key not in ("prompt", "reference")}
    return Example(row["prompt"], row["reference"], extra)


def from_hub(name: str, columns: HubColumns | None = None, *, part: str = "train") -> list[Example]:
    """Load one part of a hub's data set, without running its code. Raises UserError
    when the package `datasets` is missing, the data set cannot be loaded, or a prompt
    or reference is missing.
    """
    label = f"the data set {name!r}"
    try:
        import datasets  # type: ignore[import-not-found]  # an optional extra
    except ImportError:
        raise UserError(
            f"{label} needs the package datasets: pip install datasets; "
            "or give a file of JSON lines"
        ) from None
    configuration = columns and columns.configuration
    named = {"name": configuration} if configuration else {}
    try:
        rows = datasets.load_dataset(name, split=part, trust_remote_code=False, **named)
    # network, hub, file system and format each have their own
    except Exception as error:
        raise UserError(
            f"{label} cannot be loaded ({first_line(error)}); check its name and the network, "
            "or give a file"
        ) from error
    missing = [key for key in ("prompt", "reference") if key not in rows.column_names]
    if missing and columns is None:
        raise UserError(
            f"{label} has no column {missing[0]}, only {', '.join(rows.column_names)}; "
            "give a file of JSON lines"
        )
    try:
        examples = [columns.read(row) if columns else _example(dict(row)) for row in rows]
    except KeyError as error:
        raise UserError(
            f"{label} has no column {error}, only {', '.join(rows.column_names)}; "
            "give a file of JSON lines"
        ) from None
    for number, example in enumerate(examples):
        if not all(isinstance(text, str) and text.strip() for text in example[:2]):
            raise UserError(
                f"row {number} of {label} has a prompt or reference that is empty or not text; "
                "give a file of JSON lines"
            )
    if not examples:
        raise UserError(f"{label} has no rows in its part {part}; use another")
    return examples


def split_examples(
    examples: Sequence[Example],
    keys: Sequence[str] | None = None,
    *,
    fractions: tuple[float, float] = (0.8, 0.1),
) -> Examples:
    """Split examples with `split_rows`, by their prompts where `keys` is None."""
    keys = [example.prompt for example in examples] if keys is None else keys
    rows = split_rows(keys, fractions=fractions)
    return Examples(*([examples[row] for row in part] for part in rows))


def split_rows(keys: Sequence[str], *, fractions: tuple[float, float] = (0.8, 0.1)) -> Split:
    """Split rows into train, validation and test, by `fractions` of the first two. Rows
    with equal keys go to the same part, chosen by a hash of the key: the parts are the
    same on every machine.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):  # the prefix gives the split that records were made with
        groups[hashlib.sha256(f"0:{key}".encode()).digest()].append(row)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    limits = (fractions[0] * len(keys), (fractions[0] + fractions[1]) * len(keys))
    placed = 0
    for _, rows in sorted(groups.items()):
        parts[sum(placed >= limit - 1e-9 for limit in limits)].extend(rows)
        placed += len(rows)
    return Split(*(np.asarray(part, np.int64) for part in parts))
