"""20,475 replies from Shakespeare's plays, from the package shakespeare 0.6 (5.4 MB).

The texts are Project Gutenberg's and in the public domain; the package's code is MIT,
the rest of it CC-BY-2.5. The modern spelling is used (`*_gut.txt`), not the first
folio's (`*_gut_f.txt`).
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from jaxppo.data.archives import read_members
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import fetch

DIRECTION = re.compile(r"\[[^\[\]]{0,1000}\]")  # [Exit Ghost.], [Aside.]
HEADING = re.compile(
    r"(?:ACT|Act|SCENE|Scene)\s+(?:[IVX]+|\d+|[A-Z]+)\b|(?:PROLOGUE|EPILOGUE|INDUCTION)\.?$"
)
# but not the number of a song
NAME = re.compile(r"(?![IVX]+\.?$)[A-Z][A-Za-z'’,&. -]{1,40}")
STRAY = re.compile(r"[\[\]{}@]")  # a direction whose brackets do not match
# a direction without its brackets
MOVE = re.compile(r"(?:Re-)?(?:[Ee]nter|Exit|Exeunt)\b")


class Turn(NamedTuple):
    """What one person says without interruption."""

    speaker: str
    text: str


def load() -> Examples:
    """Load replies to the turn before them; the scenes are split into parts."""
    # The poems have no scenes, and so no turns.
    texts = read_members(fetch("shakespeare"), "*/shksprdata/texts/*_gut.txt")
    title = lambda name: PurePosixPath(name).name.removesuffix("_gut.txt")
    plays = {title(name): parse(texts[name]) for name in sorted(texts)}
    found = list(make_examples(plays))
    keys = [f"{row.extra['work']} {row.extra['scene']}" for row in found]
    return split_examples(found, keys)


def make_examples(
    plays: Mapping[str, Sequence[Sequence[Turn]]], *, longest: int = 40
) -> Iterator[Example]:
    """Make each turn a reply to the one before it; prompts and replies of more words
    than `longest` are left out.
    """
    for work, scenes in plays.items():
        for scene, said in enumerate(scenes):
            for before, reply in itertools.pairwise(said):
                fits = max(len(turn.text.split()) for turn in (before, reply)) <= longest
                if fits and not STRAY.search(before.text + reply.text):
                    speakers = (before.speaker, reply.speaker)
                    extra = {"work": work, "scene": scene, "speakers": speakers}
                    yield Example(before.text, reply.text, extra)


def parse(data: bytes) -> list[list[Turn]]:
    """Read the turns of each scene of a play in UTF-8: paragraphs with a speaker's name
    in the first line.

    Titles, persons and stage directions are left out. A scene is cut in two where a
    paragraph may or may not begin with a name, so that nobody seems to reply to the
    wrong words.

    >>> play = b"ACT I.\\n\\nBER.\\nWho is it?\\n\\n[Enter]\\n\\nFRAN.\\nNay:\\nstand."
    >>> [[tuple(turn) for turn in scene] for scene in parse(play)]
    [[('BER', 'Who is it?'), ('FRAN', 'Nay: stand.')]]
    """
    plain = DIRECTION.sub(" ", data.decode("utf-8-sig", errors="replace").replace("_", ""))
    paragraphs = [
        [line.strip() for line in block.strip().split("\n")]
        for block in re.split(r"\n\s*\n", plain)
    ]
    first_lines = Counter(lines[0] for lines in paragraphs if len(lines) > 1)
    scenes: list[list[Turn]] = []
    for lines in paragraphs:
        if HEADING.match(lines[0]):
            scenes.append([])
        elif scenes and lines[0] and not MOVE.match(lines[0]):
            _add_paragraph(scenes, lines, first_lines)
    return [scene for scene in scenes if scene]


def _add_paragraph(scenes: list[list[Turn]], lines: list[str], first_lines: Counter[str]) -> None:
    """Add a paragraph as a new turn, as more of the last turn (after a stage
    direction), or as a cut.
    """
    name = lines[0]
    if len(lines) > 1 and NAME.fullmatch(name):
        speaker, text = name.rstrip("."), " ".join(" ".join(lines[1:]).split())
        if speaker.isupper() or (name.endswith(".") and first_lines[name] > 1):
            scenes[-1].append(Turn(speaker, text))
            return
        if name.endswith("."):
            scenes.append([])  # a name that occurs once, or a short sentence
            return
    if scenes[-1]:
        last = scenes[-1].pop()
        scenes[-1].append(Turn(last.speaker, " ".join(f"{last.text} {' '.join(lines)}".split())))
