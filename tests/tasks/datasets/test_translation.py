"""Pairs of sentences out of a dictionary's entries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.data.examples import Example
from jaxppo.data.fetch import FetchError
from jaxppo.tasks.datasets import translation

ENTRIES = """# Version :: devel. A comment that ends so.
Gras {n} | Gräser {pl} | Das Gras ist grün. [bot.] :: grass | grasses | The grass is green.
Zufall {m} | Das ist purer Unsinn. :: chance | That's sheer/pure nonsense.
Halt! Lass das sein! [ugs.]; Hör auf! :: Stop doing that! [coll.]; Cut it out!
jdm. etw. sagen :: to tell sb. sth.
Das sagt er jdm. immer wieder. :: He tells sb. again and again.
uneven | Es sind drei Teile. :: uneven
Das Gras ist grün. :: Grass is always green.
„Wer bist du?“ fragte sie (leise). :: “Who are you?” she asked.
Er sagt’s mir. :: He’ll tell me.
Ja doch. :: Oh yes.
Das ist die ganze Antwort :: That is the whole answer.
"""


def pairs(text: str, **options) -> list[tuple[str, str]]:
    return [
        (example.prompt, example.reference)
        for example in translation.parse(text.encode(), **options)
    ]


def test_only_whole_sentences():
    assert pairs(ENTRIES) == [
        ("Das Gras ist grün.", "The grass is green."),
        ("Halt! Lass das sein!", "Stop doing that!"),
        ("Er sagt's mir.", "He'll tell me."),
    ]


def test_phrases_are_no_sentences():
    """Of alternatives the first; words, sentences and patterns are left out."""
    own = "hohes Gras [bot.]; Gras | im hohen Gras {n} | Heu :: tall grass; reed | in the hay | hay"
    found = translation.parse_phrases((ENTRIES + own).encode())
    both = [("hohes Gras", "tall grass"), ("im hohen Gras", "in the hay")]
    assert [(row.prompt, row.reference) for row in found] == both
    short = translation.parse_phrases(own.encode(), longest=2)
    assert [(row.prompt, row.reference) for row in short] == both[:1]


def test_lengths():
    # two words pass now; of "Das Gras ist grün." (4 words) "The grass is green." is no longer short
    # enough
    assert pairs(ENTRIES, shortest=2, longest=3) == [
        ("Er sagt's mir.", "He'll tell me."),
        ("Ja doch.", "Oh yes."),
    ]


def test_quotes_are_of_the_sentence():
    assert pairs("Sie fragte: „Wer bist du?“ :: She asked: “Who are you?”") == [
        ("Sie fragte: „Wer bist du?“", 'She asked: “Who are you?"')
    ]


@given(st.text("aA. |:;{}[]()/\n", max_size=60))
def test_any_text(text):
    try:
        found = translation.parse(text.encode(), shortest=1)
    except FetchError:
        return
    assert all(isinstance(row, Example) and row.prompt and row.reference for row in found)


@pytest.fixture(scope="module")
def real():
    try:
        return translation.load()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.ci
def test_real_sentences(real):
    rows = [row for part in real for row in part]
    assert [len(part) for part in real] == [14323, 1790, 1790]
    assert len(rows) == len({row.prompt for row in rows})
    assert not set("{}[]()<>|/;") & set("".join(row.prompt + row.reference for row in rows))
    assert {row.prompt: row.reference for row in rows}[
        "Ich tat es auf seine Anregung hin."
    ] == "I did it at his suggestion."
