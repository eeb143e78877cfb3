"""250 scientific papers, each summed up in one sentence for each of three aspects, from
the package aclsum 0.1.2 (MIT, 5.2 MB).

Takeshita et al. 2024, ACLSum: A New Dataset for Aspect-based Summarization of
Scientific Publications, https://arxiv.org/abs/2403.05303. The package holds each
paper's abstract, introduction and conclusion as tokenized sentences. The prompt here is
the abstract (130 words in the mean); the introduction would be five times as long. The
package is read as an archive, never installed; its own split of 100, 50 and 100 papers
is kept.
"""

import json
import re
from typing import Any

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Example, Examples
from jaxppo.data.fetch import FetchError, fetch

ASPECTS = ("challenge", "approach", "outcome")
# The sentences are tokenized, "( NER ) systems , here", and the summaries are not
BEFORE, AFTER = re.compile(r" +(?=[.,;:!?)\]%]|'s\b|n't\b)"), re.compile(r"(?<=[(\[]) +")


def load() -> Examples:
    """Prompts of an abstract and references of one sentence; `extra["aspect"]` says of
    which of three, one after the other.

    Raises:
        FetchError: when the download fails or the files are not what they should be.
    """
    archive = fetch("aclsum")
    return Examples(
        *(
            parse(read_member(archive, f"aclsum/dataset/{part}.jsonl"))
            for part in ("train", "val", "test")
        )
    )


def parse(data: bytes) -> list[Example]:
    """Read JSON lines of {"id", "summary": {aspect: text}, "sentences": {"abstract":
    [text, ...]}}.

    >>> summary = '{"challenge": "Slow.", "approach": "They try.", "outcome": "Fast."}'
    >>> rows = parse(
    ...     (
    ...         '{"id": "P1", "summary": '
    ...         + summary
    ...         + ', "sentences": {"abstract": ["It is .", "( So )"]}}'
    ...     ).encode()
    ... )
    >>> [(row.prompt, row.reference, row.extra["aspect"]) for row in rows][:2]
    [('It is. (So)', 'Slow.', 'challenge'), ('It is. (So)', 'They try.', 'approach')]
    """
    found: list[Example] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            found.extend(_examples(line, number))
    if not found:
        raise FetchError("the summaries are empty; it is another file")
    return found


def _examples(line: bytes, number: int) -> list[Example]:
    try:
        row: Any = json.loads(line)
        prompt = _written(" ".join(row["sentences"]["abstract"]))
        references = {aspect: " ".join(row["summary"][aspect].split()) for aspect in ASPECTS}
        if prompt and all(references.values()):
            paper = str(row["id"])
            return [
                Example(prompt, references[aspect], {"aspect": aspect, "paper": paper})
                for aspect in ASPECTS
            ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise FetchError(
        f"line {number} of the summaries is not a paper with an abstract and a summary of each of three aspects"
    )


def _written(text: str) -> str:
    """Text as one writes it, from tokens with spaces between."""
    return AFTER.sub("", BEFORE.sub("", " ".join(text.split())))
