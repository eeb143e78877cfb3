"""Data sets of the tasks, one per module: `load()` downloads files whose hash is known
(see `data.fetch`), reads and splits them; `parse` reads their bytes.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from jaxppo.data.examples import Example


def first_of_each_prompt(examples: Iterable[Example]) -> list[Example]:
    """Keep the first of examples with equal prompts."""
    found: dict[str, Example] = {}
    for example in examples:
        found.setdefault(example.prompt, example)
    return list(found.values())


def read_json_lines(data: bytes, convert: Callable[[Any], list[Example]]) -> list[Example]:
    """Convert each line of JSON to examples; blank lines are skipped."""
    rows = [json.loads(line) for line in data.split(b"\n") if line.strip()]
    return [example for row in rows for example in convert(row)]
