"""857 questions with a short answer, from the game quiz of Debian's bsdgames 2.17-29
(BSD licence, 1 MB).

Capitals, states, chemical elements, presidents, opposites, animals' young. A file of
the game has a row a line, its columns between colons; a column is a pattern of what the
game accepts as an answer: `{John }Adams|Adams`, `[St.|Saint] John's`. Here each
question names one column and asks for another. Debian's own client downloads it:
apt-get, on Debian 12 for amd64 (elsewhere: a file of one's own).
"""

import re

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import FetchError, fetch

CAPITAL = (0, 1, "What is the capital of {}?")

QUESTIONS = {  # file -> (column of the question, of the answer, how it is asked)
    "africa": (CAPITAL,),
    "america": (CAPITAL,),
    "asia": (CAPITAL,),
    "europe": (CAPITAL,),
    "province": (CAPITAL,),
    "state": (CAPITAL, (0, 2, "What is the abbreviation of {}?")),
    "elements": (
        (0, 3, "Which element has the symbol {}?"),
        (3, 0, "What is the symbol of {}?"),
        (3, 1, "What is the atomic number of {}?"),
    ),
    "pres": ((0, 3, "Who was president after {}?"),),
    "posneg": ((0, 1, "What is the opposite of {}?"),),
    "sexes": ((0, 1, "What is the female of {}?"),),
    "babies": ((0, 1, "Which animal is young as a {}?"),),
    "collectives": ((0, 1, "What is a group of {} called?"),),
}

GROUP = re.compile(r"[{\[]([^{}\[\]|]*)(?:\|[^{}\[\]]*)?[}\]]")


def load(*, seed: int = 0) -> Examples:
    """Questions and answers: 60 % to train, 15 % to choose by, 25 % to test; those of
    one row of a file stay together.

    Raises:
        FetchError: when the download fails or a file is not what it should be.
    """
    archive = fetch("bsdgames")
    found: dict[str, Example] = {}  # some countries stand in two files
    for name in QUESTIONS:
        for row in parse(read_member(archive, f"*/usr/share/games/bsdgames/quiz/{name}"), name):
            found.setdefault(row.prompt, row)
    rows = list(found.values())
    return split_examples(
        rows, [row.extra["row"] for row in rows], seed=seed, fractions=(0.6, 0.15)
    )


def parse(data: bytes, name: str) -> list[Example]:
    r"""The questions of one file, each once; the first answer of equal questions stays.

    Args:
        data: rows of the file, in ASCII; a backslash before the line's end continues
        it. name: one of QUESTIONS.

    >>> [
    ...     (row.prompt, row.reference)
    ...     for row in parse(b"Conn{ecticut}|CT:Hartford:CT:laurel", "state")
    ... ]
    [('What is the capital of Connecticut?', 'Hartford'), ('What is the abbreviation of Connecticut?', 'CT')]
    """
    found: dict[str, Example] = {}
    for line in data.decode("latin-1").replace("\\\n", "").splitlines():
        columns = [first_answer(pattern) for pattern in line.split(":")]
        if not line.isascii() or not line.isprintable():
            continue  # letters put together on a printer
        for asked, answer, words in QUESTIONS[name]:
            if len(columns) > max(asked, answer) and columns[asked] and columns[answer]:
                prompt = words.format(columns[asked])
                found.setdefault(
                    prompt, Example(prompt, columns[answer], {"row": f"{name}: {columns[0]}"})
                )
    if not found:
        raise FetchError(f"the quiz {name} has no questions; it is another file")
    return list(found.values())


def first_answer(pattern: str) -> str:
    """The first and longest answer that a pattern of the game accepts.

    >>> [
    ...     accepted(x)
    ...     for x in (
    ...         "{J{ohn} }Adams|Quincy",
    ...         "[St.|Saint] John's",
    ...         "forget{-| }me{-| }not",
    ...     )
    ... ]
    ['John Adams', "St. John's", 'forget-me-not']
    """
    while GROUP.search(pattern):
        pattern = GROUP.sub(r"\1", pattern)
    return " ".join(pattern.split("|")[0].split())
