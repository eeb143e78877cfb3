"""250 scientific papers, each with a one-sentence summary of three aspects: ACLSum,
from the package aclsum 0.1.2 (MIT, 5.2 MB).

Takeshita et al. 2024, https://arxiv.org/abs/2403.05303. The package holds tokenized
sentences of abstract, introduction and conclusion. Prompts are abstracts, 130 words on
average; an introduction is five times as long. Its split is kept: 100, 50, 100 papers.
"""

import re
from typing import Any

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Example, Examples
from jaxppo.data.fetch import fetch
from jaxppo.tasks.datasets import read_json_lines

ASPECTS = ("challenge", "approach", "outcome")
# Sentences are tokenized, "( NER ) systems , here": spaces to remove
BEFORE, AFTER = re.compile(r" +(?=[.,;:!?)\]%]|'s\b|n't\b)"), re.compile(r"(?<=[(\[]) +")


def load() -> Examples:
    """Load abstracts and, for each aspect in turn (`extra["aspect"]`), a sentence."""
    archive = fetch("aclsum")
    read = lambda part: read_member(archive, f"aclsum/dataset/{part}.jsonl")
    return Examples(*(parse(read(part)) for part in ("train", "val", "test")))


def parse(data: bytes) -> list[Example]:
    """Read JSON lines of {"id", "summary": {aspect: text}, "sentences": {"abstract":
    [text, ...]}}.

    >>> import json
    >>> summary = {"challenge": "Slow.", "approach": "We try.", "outcome": "Fast."}
    >>> paper = {"id": 1, "summary": summary, "sentences": {"abstract": ["It is ."]}}
    >>> rows = parse(json.dumps(paper).encode())
    >>> rows[0].prompt, rows[0].reference, rows[0].extra["aspect"]
    ('It is.', 'Slow.', 'challenge')
    """
    return read_json_lines(data, _examples)


def _examples(row: Any) -> list[Example]:
    prompt = _untokenized(" ".join(row["sentences"]["abstract"]))
    summaries = {aspect: " ".join(row["summary"][aspect].split()) for aspect in ASPECTS}
    paper = str(row["id"])
    return [Example(prompt, x, {"aspect": y, "paper": paper}) for y, x in summaries.items()]


def _untokenized(text: str) -> str:
    """Remove the spaces that a tokenizer added."""
    return AFTER.sub("", BEFORE.sub("", " ".join(text.split())))
