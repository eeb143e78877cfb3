"""17,903 sentences and 55,456 phrases in German and English from the dictionary Ding
(Debian's trans-de-en 1.9-6, GPL-2.0-or-later, 6.3 MB).

Frank Richter, TU Chemnitz, https://dict.tu-chemnitz.de/. An entry holds a word, its
forms and examples: `Gras | Das Gras ist grün. :: grass | The grass is green.`; only
examples that are whole sentences on both sides are used. apt-get downloads it, on
Debian 12; elsewhere pass your own file.
"""

import re
from collections.abc import Iterator

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import fetch
from jaxppo.tasks.datasets import first_of_each_prompt

MEMBER = "*/usr/share/trans/de-en"
# {n}, [ugs.], (Sprichwort), <purer>: notes on the words
NOTE = re.compile(r"\s*(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|<[^>]*>)")
END = re.compile(r"[.!?…]")
SENTENCE = re.compile(r'["„]?[A-ZÄÖÜ0-9].*[.!?…]["“]?', re.DOTALL)
# alternatives and patterns: `sheer/pure`, `jdm. etw. sagen`, `Stop it!: Stop that!`
PATTERN = re.compile(r"[;/|{}\[\]()<>~]|[.!?]: |\b(?:etw|jd|jdm|jdn|jds|sth|sb|sb's|sth's)\.")
PLAIN = str.maketrans({"’": "'", "‘": "'", "”": '"', "–": "-"})


def load() -> Examples:
    """Load German prompts and English references, split by the German sentence."""
    return split_examples(parse(read_member(fetch("ding"), MEMBER)))


def load_phrases(*, longest: int = 8) -> list[Example]:
    """Load pairs of phrases of two to `longest` words on both sides, which are no
    sentences: "große Anstrengungen", "intense efforts".
    """
    return parse_phrases(read_member(fetch("ding"), MEMBER), longest=longest)


def parse(data: bytes, *, shortest: int = 3, longest: int = 40) -> list[Example]:
    """Read the pairs of whole sentences, and the first translation of equal sentences.

    Args:
        data: UTF-8 lines of `German :: English`, each side in parts between ` | `;
            comments start with #.
        shortest, longest: words of a sentence.

    >>> entry = "Gras {n} | Es ist grün. [bot.]; Grün ist es. :: grass | It is green."
    >>> [(row.prompt, row.reference) for row in parse(entry.encode())]
    [('Es ist grün.', 'It is green.')]
    """
    fits = lambda text: shortest <= len(text.split()) <= longest and _is_sentence(text)
    ways = (
        Example(_first_way(german), _first_way(english))
        for german, english in _pairs(data)
        if END.search(german) and END.search(english)  # quick: most parts are no sentences
    )
    return first_of_each_prompt(x for x in ways if fits(x.prompt) and fits(x.reference))


def parse_phrases(data: bytes, *, longest: int = 8) -> list[Example]:
    """Read the pairs of parts that are no sentences, in the same format.

    >>> entry = "Gras {n} | im hohen Gras; im Gras :: grass | in tall grass [fig.]"
    >>> [(row.prompt, row.reference) for row in parse_phrases(entry.encode())]
    [('im hohen Gras', 'in tall grass')]
    """

    def fits(text: str) -> bool:
        return 2 <= len(text.split()) <= longest and not (END.search(text) or PATTERN.search(text))

    first = lambda part: _first_way(part.split(";")[0])
    ways = (Example(first(german), first(english)) for german, english in _pairs(data))
    return first_of_each_prompt(x for x in ways if fits(x.prompt) and fits(x.reference))


def _pairs(data: bytes) -> Iterator[tuple[str, str]]:
    """Return the opposite parts of all entries."""
    for line in data.decode("utf-8-sig").splitlines():
        sides = [side.split(" | ") for side in line.split(" :: ")]
        if not line.startswith("#") and len(sides) == 2 and len(sides[0]) == len(sides[1]):
            yield from zip(*sides, strict=True)


def _first_way(part: str) -> str:
    """Return the first of several ways to say it, without notes: `That's it!; That will
    do! [coll.]`.
    """
    plain = NOTE.sub("", part).translate(PLAIN)
    return " ".join(re.split(r"(?<=[.!?…])\s*;", plain)[0].split())


def _is_sentence(text: str) -> bool:
    return SENTENCE.fullmatch(text) is not None and PATTERN.search(text) is None
