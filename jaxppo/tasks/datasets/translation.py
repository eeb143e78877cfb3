"""17,903 sentences in German and English, from the dictionary Ding (Debian's
trans-de-en 1.9-6, GPL-2.0-or-later, 6.3 MB).

The dictionary is by Frank Richter, TU Chemnitz (https://dict.tu-chemnitz.de/). An entry
holds a word, its forms and examples of its use, `Gras | Das Gras ist grün. :: grass |
The grass is green.`; only the examples that are whole sentences on both sides are
taken. Debian's own client downloads it: apt-get, on Debian 12 (elsewhere: a file of
one's own).
"""

import re
from collections.abc import Iterator

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import FetchError, fetch

NOTE = re.compile(
    r"\s*(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|<[^>]*>)"
)  # {n}, [ugs.], (Sprichwort), <purer>: about the words, not of them
END = re.compile(r"[.!?…]")
SENTENCE = re.compile(r'["„]?[A-ZÄÖÜ0-9].*[.!?…]["“]?', re.DOTALL)
# What marks alternatives and patterns: `sheer/pure`, `jdm. etw. sagen`, `Stop it!: Stop
# that!`
PATTERN = re.compile(r"[;/|{}\[\]()<>~]|[.!?]: |\b(?:etw|jd|jdm|jdn|jds|sth|sb|sb's|sth's)\.")
PLAIN = str.maketrans({"’": "'", "‘": "'", "”": '"', "–": "-"})


def load(*, seed: int = 0) -> Examples:
    """German prompts and English references, split by the German sentence.

    Raises:
        FetchError: when the download fails or the file is not what it should be.
    """
    return split_examples(parse(read_member(fetch("ding"), "*/usr/share/trans/de-en")), seed=seed)


def parse(data: bytes, *, shortest: int = 3, longest: int = 40) -> list[Example]:
    """The pairs of whole sentences; the first translation of equal sentences stays.

    Args:
        data: lines of `German :: English` in UTF-8, each side in parts between ` | `;
        comments start with #. shortest, longest: words of a sentence.

    >>> text = "Gras {n} | Das Gras ist grün. [bot.]; Grün ist es. :: grass | The grass is green."
    >>> parse(text.encode())
    [Example(prompt='Das Gras ist grün.', reference='The grass is green.', extra=mappingproxy({}))]
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise FetchError(f"the dictionary is not UTF-8 (byte {error.start})") from None
    found: dict[str, str] = {}
    for line in lines:
        for german, english in _pairs(line):
            if all(
                shortest <= len(side.split()) <= longest and _is_sentence(side)
                for side in (german, english)
            ):
                found.setdefault(german, english)
    if not found:
        raise FetchError(
            "the dictionary has no pairs of sentences ('German :: English'); it is another file"
        )
    return [Example(*pair) for pair in found.items()]


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """The parts of one entry that stand across from each other, where both could be
    sentences.
    """
    sides = [side.split(" | ") for side in line.split(" :: ")]
    if not line.startswith("#") and len(sides) == 2 and len(sides[0]) == len(sides[1]):
        for german, english in zip(*sides, strict=True):
            if END.search(german) and END.search(
                english
            ):  # few do: most of the file need not be cleaned
                yield _first(german), _first(english)


def _first(part: str) -> str:
    """The first of several ways to say it, without notes: `That's it!; That will do!
    [coll.]`.
    """
    plain = NOTE.sub("", part).translate(PLAIN)
    return " ".join(re.split(r"(?<=[.!?…])\s*;", plain)[0].split())


def _is_sentence(text: str) -> bool:
    return SENTENCE.fullmatch(text) is not None and PATTERN.search(text) is None
