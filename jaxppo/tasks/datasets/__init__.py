"""Data sets of the tasks, one per module: `load()` downloads pinned files (see
`data.fetch`), reads and splits them; `parse` reads their bytes.

Both raise FetchError if a file is not what it should be.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from jaxppo.data.examples import Example
from jaxppo.data.fetch import FetchError


def first_of_each_prompt(examples: Iterable[Example], what: str) -> list[Example]:
    """Keep the first of examples with equal prompts. Raises FetchError without any."""
    found: dict[str, Example] = {}
    for example in examples:
        found.setdefault(example.prompt, example)
    if not found:
        raise FetchError(f"there are no examples in {what}; it is another file")
    return list(found.values())


def read_json_lines(
    data: bytes, convert: Callable[[Any], list[Example]], *, what: str, expected: str
) -> list[Example]:
    """Convert each line of JSON to examples; blank lines are skipped.

    Raises FetchError without any examples, and where `convert` fails: "line N of {what}
    is not {expected}".
    """
    found: list[Example] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                found += convert(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise FetchError(f"line {number} of {what} is not {expected}") from None
    if not found:
        raise FetchError(f"there are no examples in {what}; it is another file")
    return found
