"""3,844 questions on cause and effect with two options: QuaRTz, from the package evals
3.0.1.post1 (46 MB).

Tafjord et al. 2019, https://arxiv.org/abs/1909.03553, CC-BY-4.0; the package is MIT. It
lacks the passages that belong to the questions. Half of the right answers are A. Only
one member of 1.3 MB is unpacked.
"""

import re
from typing import Any

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import fetch
from jaxppo.tasks.datasets import first_of_each_prompt, read_json_lines

OPTIONS = re.compile(
    r"(?P<question>.*\S)\s*\n\s*A: (?P<a>[^\n]*\S)\s*\n\s*B: (?P<b>[^\n]*\S)\s*", re.DOTALL
)


def load() -> Examples:
    """Load questions with their options and the right option, split by question."""
    found = parse(read_member(fetch("evals"), "evals/registry/data/quartz/samples.jsonl"))
    return split_examples(found, [row.extra["question"] for row in found])


def parse(data: bytes) -> list[Example]:
    """Read JSON lines of {"input": messages, "ideal": letter}; the user's message holds
    the question and the options.

    >>> import json
    >>> message = {"role": "user", "content": "In the sun ice\\n A: melts\\n B: is"}
    >>> (row,) = parse(json.dumps({"input": [message], "ideal": "A"}).encode())
    >>> row.prompt, row.reference, row.extra["letter"]
    ('In the sun ice\\nA: melts\\nB: is', 'melts', 'A')
    """
    return first_of_each_prompt(read_json_lines(data, _examples))


def _examples(row: Any) -> list[Example]:
    (text,) = (message["content"] for message in row["input"] if message["role"] == "user")
    parts = OPTIONS.fullmatch(text)
    assert parts is not None
    question, options = parts["question"].strip(), (parts["a"], parts["b"])
    right = dict(zip("AB", options, strict=True))[row["ideal"]]
    prompt = f"{question}\nA: {options[0]}\nB: {options[1]}"
    extra = {"question": question, "options": options, "letter": row["ideal"]}
    return [Example(prompt, right, extra)]
