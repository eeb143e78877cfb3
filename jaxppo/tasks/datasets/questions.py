"""3,844 questions on cause and effect with two answers to choose from: QuaRTz, in the
package evals 3.0.1.post1 (46 MB).

Tafjord et al. 2019, QuaRTz: An Open-Domain Dataset of Qualitative Relationship
Questions, https://arxiv.org/abs/1909.03553, which comes under CC-BY-4.0; the package's
licence is MIT. The passages that belong to the questions are not in the package. Half
of the right answers are A. The package is read as an archive: of its 755 MB only one
member of 1.3 MB is unpacked.
"""

import json
import re
from typing import Any

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import FetchError, fetch

OPTIONS = re.compile(
    r"(?P<question>.*\S)\s*\n\s*A: (?P<a>[^\n]*\S)\s*\n\s*B: (?P<b>[^\n]*\S)\s*", re.DOTALL
)
LETTERS = ("A", "B")


def load(*, seed: int = 0) -> Examples:
    """Prompts of a question and its options, references of the right option, split by
    the question.

    Raises:
        FetchError: when the download fails or the file is not what it should be.
    """
    found = parse(read_member(fetch("evals"), "evals/registry/data/quartz/samples.jsonl"))
    return split_examples(found, [row.extra["question"] for row in found], seed=seed)


def parse(data: bytes) -> list[Example]:
    """Read JSON lines of {"input": messages, "ideal": letter}; the user's message holds
    the question and the options.

    >>> talk = '[{"role": "user", "content": "More resistors. The resistance\\\\n\\\\n A: increases\\\\n B: decreases"}]'
    >>> (row,) = parse(('{"input": ' + talk + ', "ideal": "A"}').encode())
    >>> print(row.prompt)
    More resistors. The resistance
    A: increases
    B: decreases
    >>> row.reference, row.extra["letter"], row.extra["options"]
    ('increases', 'A', ('increases', 'decreases'))
    """
    found: dict[str, Example] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            example = _example(line, number)
            found.setdefault(example.prompt, example)
    if not found:
        raise FetchError("the questions are empty; it is another file")
    return list(found.values())


def _example(line: bytes, number: int) -> Example:
    try:
        row: Any = json.loads(line)
        (text,) = (message["content"] for message in row["input"] if message["role"] == "user")
        letter = row["ideal"]
        parts = OPTIONS.fullmatch(text)
    except (ValueError, TypeError, KeyError, RecursionError):
        parts = letter = None
    if parts is None or letter not in LETTERS:
        raise FetchError(
            f"line {number} of the questions is not a question with the options A and B and the letter of one"
        )
    question, options = parts["question"].strip(), (parts["a"], parts["b"])
    prompt = "\n".join(
        [question, *(f"{name}: {option}" for name, option in zip(LETTERS, options, strict=True))]
    )
    right = options[LETTERS.index(letter)]
    return Example(prompt, right, {"question": question, "options": options, "letter": letter})
