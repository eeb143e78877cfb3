"""Questions with two options, out of a chat's messages."""

import json

import pytest

from jaxppo.data.fetch import FetchError
from jaxppo.tasks.datasets import questions


def line(text: str, ideal: str = "B", role: str = "user") -> str:
    return json.dumps(
        {
            "input": [{"role": "system", "content": "Choose."}, {"role": role, "content": text}],
            "ideal": ideal,
        }
    )


ICE = "Two cups.\n\nThe warmer one melts ice\n\n A: slower\n B: faster "


def test_parse():
    lines = [line(ICE), "", line(ICE, "A"), line("Ice\n A: is\n B: is not", "A"), ""]
    first, second = questions.parse("\n".join(lines).encode())
    assert (
        first.prompt == "Two cups.\n\nThe warmer one melts ice\nA: slower\nB: faster"
    )  # the first of equal prompts stays
    assert first.reference == "faster"
    assert first.extra == {
        "question": "Two cups.\n\nThe warmer one melts ice",
        "options": ("slower", "faster"),
        "letter": "B",
    }
    assert (second.prompt, second.reference, second.extra["letter"]) == (
        "Ice\nA: is\nB: is not",
        "is",
        "A",
    )


@pytest.fixture(scope="module")
def real():
    try:
        return questions.load()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.ci
def test_real_questions(real):
    assert [len(part) for part in real] == [3076, 384, 384]
    rows = [row for part in real for row in part]
    assert len(rows) == len({row.prompt for row in rows}) == 3844
    asked = [{row.extra["question"] for row in part} for part in real]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    assert all(
        row.reference == row.extra["options"]["AB".index(row.extra["letter"])] for row in rows
    )
    assert (
        0.45 < sum(row.extra["letter"] == "A" for row in rows) / len(rows) < 0.55
    )  # always "A" is no good
