"""Prompts with their references: what a language task is made of, from a file, a hub,
or a loader beside this module.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from jaxppo.data import jsonl
from jaxppo.errors import UserError

FILE_ENDINGS = (".jsonl", ".json", ".gz", ".txt", ".csv")


class Example(NamedTuple):
    """A prompt and what its response is compared with."""

    prompt: str
    reference: str
    extra: Mapping[str, Any] = MappingProxyType(
        {}
    )  # what else the task knows: the words, the right letter, features


class Examples(NamedTuple):
    """Three disjoint parts."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def split(
    examples: Sequence[Example],
    keys: Sequence[str] | None = None,
    *,
    seed: int = 0,
    fractions: tuple[float, float] = (0.8, 0.1),
) -> Examples:
    """Split into train, validation and test (80, 10 and 10 % by default) by a hash of
    the keys; equal keys stay together.

    Args:
        examples: [N].
        keys: [N] what must not be seen in two parts; the prompts, where None.
        seed: another seed gives another split.
        fractions: of train and validation; test is the rest.

    >>> parts = split([Example(prompt, "") for prompt in "abacd"], fractions=(0.6, 0.2))
    >>> [[example.prompt for example in part] for part in parts]
    [['d', 'a', 'a'], ['c'], ['b']]
    """
    keys = [example.prompt for example in examples] if keys is None else keys
    if len(keys) != len(examples):
        raise ValueError(f"{len(keys)} keys for {len(examples)} examples")
    return Examples(
        *(
            [examples[row] for row in part]
            for part in split_rows(keys, seed=seed, fractions=fractions)
        )
    )


def load(data: str, *, seed: int = 0, fractions: tuple[float, float] = (0.8, 0.1)) -> Examples:
    """The examples of a file of JSON lines, or of a data set on a hub where there is no
    such file; split by prompt.

    Raises:
        UserError: for a missing or bad file, or a data set that cannot be had; see
        `read` and `from_hub`.
    """
    path = Path(data).expanduser()
    if not path.exists() and (
        path.is_absolute() or data.startswith((".", "~")) or data.endswith(FILE_ENDINGS)
    ):
        raise UserError(
            f"there is no file {data}; give a file of JSON lines or the id of a data set"
        )
    found = read(path) if path.exists() else from_hub(data)
    alike = (
        len({example.prompt for example in found}) == 1
    )  # as of recordings: what they are told apart by is the reference
    return split(
        found,
        [example.reference for example in found] if alike else None,
        seed=seed,
        fractions=fractions,
    )


def read(path: str | Path) -> list[Example]:
    """The examples of a file with one object {"prompt": "...", "reference": "..."} a
    line; its other keys become `extra`. The prompt may be empty where there is a
    "context", what the policy hears.

    Raises:
        UserError: with the line's number, for a line that is no such object. See
        `jsonl.read`.
    """
    found = list(jsonl.read(path, strings=("reference",)))
    for line, row in found:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not (prompt.strip() or "context" in row):
            what = (
                "is missing"
                if prompt is None
                else "is empty"
                if isinstance(prompt, str)
                else f"is {prompt!r}, no text"
            )
            raise UserError(f"{path}, line {line}: 'prompt' {what}")
    return [_example(row) for _, row in found]


def _example(row: dict[str, Any]) -> Example:
    return Example(
        row["prompt"],
        row["reference"],
        {key: row[key] for key in row if key not in ("prompt", "reference")},
    )


def from_hub(name: str, *, part: str = "train") -> list[Example]:
    """The examples of a data set on the Hugging Face hub with the columns prompt and
    reference; none of its code is run.

    Args:
        name: owner/name.
        part: which of the data set's own parts.

    Raises:
        UserError: when the package `datasets` is missing, the data set cannot be had,
        or a row has no such texts.
    """
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(
            f"{_data_set(name)} needs the package datasets: pip install datasets; or give a file of JSON lines"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=part, trust_remote_code=False)
    except (
        Exception
        # of the network, the hub, the file system, the data's form: each has its own type
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"{_data_set(name)} cannot be had ({reason}); check its name and the network, or give a file"
        ) from error
    missing = [key for key in ("prompt", "reference") if key not in rows.column_names]
    if missing:
        columns = ", ".join(rows.column_names)
        raise UserError(
            f"{_data_set(name)} has no column {missing[0]} (but {columns}); write what you need to a file of JSON lines"
        )
    examples = [_example(dict(row)) for row in rows]
    for number, example in enumerate(examples):
        if not all(isinstance(text, str) and text.strip() for text in example[:2]):
            raise UserError(
                f"row {number} of {_data_set(name)} has a prompt or reference that is empty or no text; use a file"
            )
    if not examples:
        raise UserError(f"{_data_set(name)} has no rows in its part {part}; use another")
    return examples


def _data_set(name: str) -> str:
    return f"the data set {name!r}"


class Split(NamedTuple):
    """Row numbers of three disjoint parts."""

    train: Int64[np.ndarray, "a"]
    validation: Int64[np.ndarray, "b"]
    test: Int64[np.ndarray, "c"]


def split_rows(
    keys: Sequence[str], *, seed: int, fractions: tuple[float, float] = (0.8, 0.1)
) -> Split:
    """Split rows into train, validation and test (80, 10 and 10 % by default); rows
    with equal keys stay together.

    The key is what must not be seen twice: the sentence, or the prompt that is cut from
    it. Rows are placed by a hash of the seed and the key, so the parts hold the same
    sentences on every machine and with every version of NumPy.

    Args:
        keys: [N] one string for each row.
        seed: another seed gives another split.
        fractions: of train and validation; test is the rest.

    >>> [
    ...     part.tolist()
    ...     for part in split(["a", "b", "a", "c", "d"], seed=0, fractions=(0.6, 0.2))
    ... ]
    [[4, 0, 2], [3], [1]]
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[hashlib.sha256(f"{seed}:{key}".encode()).digest()].append(row)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    limits = (fractions[0] * len(keys), (fractions[0] + fractions[1]) * len(keys))
    placed = 0
    for _, rows in sorted(groups.items()):
        parts[sum(placed >= limit - 1e-9 for limit in limits)].extend(rows)
        placed += len(rows)
    return Split(*(np.asarray(part, np.int64) for part in parts))
