"""857 questions with short answers from the game quiz of Debian's bsdgames 2.17-29 (BSD
licence, 1 MB).

Capitals, states, chemical elements, presidents, opposites, young animals. A line of a
file has columns between colons; a column is a pattern of accepted answers: `{John
}Adams|Adams`, `[St.|Saint] John's`. A question names one column and asks for another.
apt-get downloads it, on Debian 12 for amd64; elsewhere pass your own file.
"""

import re
from collections.abc import Iterator

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.data.fetch import fetch
from jaxppo.tasks.datasets import first_of_each_prompt

CAPITAL = (0, 1, "What is the capital of {}?")

QUESTIONS = {  # file -> (column to ask about, column of the answer, question)
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


def load() -> Examples:
    """Load questions and answers: 60 % for training, 15 % for validation, the rest for
    test. Questions about one row of a file stay together.
    """
    archive = fetch("bsdgames")
    read = lambda name: read_member(archive, f"*/usr/share/games/bsdgames/quiz/{name}")
    # some countries are in two files
    rows = first_of_each_prompt(row for name in QUESTIONS for row in parse(read(name), name))
    keys = [row.extra["row"] for row in rows]
    return split_examples(rows, keys, fractions=(0.6, 0.15))


def parse(data: bytes, name: str) -> list[Example]:
    r"""Read the questions of one file; of equal questions the first.

    Args:
        data: rows in ASCII; a backslash at the end of a line continues it.
        name: one of QUESTIONS.

    >>> rows = parse(b"Conn{ecticut}|CT:Hartford:CT:laurel", "state")
    >>> rows[0].prompt, rows[0].reference
    ('What is the capital of Connecticut?', 'Hartford')
    """
    return first_of_each_prompt(_questions(data, name))


def _questions(data: bytes, name: str) -> Iterator[Example]:
    for line in data.decode("latin-1").replace("\\\n", "").splitlines():
        if not line.isascii() or not line.isprintable():
            continue  # letters that a printer would overstrike
        columns = [first_answer(pattern) for pattern in line.split(":")]
        for asked, answer, question in QUESTIONS[name]:
            if len(columns) > max(asked, answer) and columns[asked] and columns[answer]:
                extra = {"row": f"{name}: {columns[0]}"}
                yield Example(question.format(columns[asked]), columns[answer], extra)


def first_answer(pattern: str) -> str:
    """Return the first answer that a pattern accepts, with its optional parts.

    >>> first_answer("{J{ohn} }Adams|Quincy"), first_answer("[St.|Saint] John's")
    ('John Adams', "St. John's")
    """
    while GROUP.search(pattern):
        pattern = GROUP.sub(r"\1", pattern)
    return " ".join(pattern.split("|")[0].split())
