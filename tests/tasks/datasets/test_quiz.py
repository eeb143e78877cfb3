"""Questions out of the columns of a game's files, whose answers are patterns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.data.examples import Example
from jaxppo.data.fetch import FetchError
from jaxppo.tasks.datasets import quiz


@pytest.mark.parametrize(
    ("pattern", "answer"),
    [
        ("Luanda", "Luanda"),
        ("lion|tiger|bear", "lion"),
        ("{J{ohn} }Adams", "John Adams"),  # what may be left out is said
        ("[St.|Saint] John's", "St. John's"),
        ("forget{-| }me{-| }not", "forget-me-not"),
        ("Andorra la V[ell|iej]a", "Andorra la Vella"),
        ("W[illia|]m [I|1|the Conqueror]", "William I"),
        ("G{eorge {H{. }|Herbert }}Bush|Bush {the elder}", "George H. Bush"),
        ("", ""),
    ],
)
def test_first_answer(pattern, answer):
    assert quiz.first_answer(pattern) == answer


@given(st.text("ab{}[]| ", max_size=30))
def test_any_pattern(pattern):
    assert "|" not in quiz.first_answer(pattern)


def pairs(text: str, name: str) -> list[tuple[str, str]]:
    return [(row.prompt, row.reference) for row in quiz.parse(text.encode("latin-1"), name)]


def test_each_question_of_a_file():
    assert pairs("H:1:1.008:Hydrogen\n", "elements") == [
        ("Which element has the symbol H?", "Hydrogen"),
        ("What is the symbol of Hydrogen?", "H"),
        ("What is the atomic number of Hydrogen?", "1"),
    ]


def test_questions_of_a_row_have_its_name():
    rows = quiz.parse(b"Ala{bama}|AL:Montgomery:AL:goldenrod", "state")
    assert {row.extra["row"] for row in rows} == {"state: Alabama"}


def test_rows_without_a_question_are_skipped():
    bad = "short:row\n:1:2:nobody\nB\bBold:a:b:c\n\xc5land:a:b:c\n"
    text = f"Adams:1797-1801:Adams:\\\nJefferson\nAdams:1825-29:Calhoun:Jackson\n{bad}"
    assert pairs(text, "pres") == [
        ("Who was president after Adams?", "Jefferson")
    ]  # continued; the first of equal questions


@pytest.fixture(scope="module")
def real():
    try:
        return quiz.load()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.ci
def test_real_questions(real):
    assert [len(part) for part in real] == [516, 127, 214]
    rows = [row for part in real for row in part]
    assert len({row.prompt for row in rows}) == 857
    names = [{row.extra["row"] for row in part} for part in real]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    assert Example("What is the capital of Angola?", "Luanda", {"row": "africa: Angola"}) in rows
    assert not [row for row in rows if set(row.prompt + row.reference) & set("{}[]|\\:")]
