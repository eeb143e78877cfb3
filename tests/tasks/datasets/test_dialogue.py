"""Turns of a play: who speaks, what is speech, and what is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.data.fetch import FetchError
from jaxppo.tasks.datasets import dialogue
from jaxppo.tasks.datasets.dialogue import Turn

PLAY = b"""THE PLAY

PERSONS

ANNE, a queen.
BEN.

ACT I.

SCENE I. A hall.

[Enter ANNE and BEN; a Ghost
behind them.]

ANNE.
Who is there?

BEN.
[Aside.] A friend:
speak _low_.

[Exit ANNE.]

She goes.

Enter a MESSENGER.

Mes.
My lord!

BEN
What now?

SCENE II. A wood.

Mes.
Here.

Ghost.
I am he
that died.

ANNE.
Who?

BEN.
The king, I think, [to ANNE
or his brother.
"""


def test_parse():
    assert dialogue.parse(PLAY) == [
        [
            Turn("ANNE", "Who is there?"),
            Turn(
                "BEN", "A friend: speak low. She goes."
            ),  # the paragraph after the direction is his, too
            Turn("Mes", "My lord!"),
            Turn("BEN", "What now?"),
        ],
        [Turn("Mes", "Here.")],
        # "Ghost." comes once and is not in capitals: no name for certain, so the scene is cut, and
        # ANNE replies to nobody
        [Turn("ANNE", "Who?"), Turn("BEN", "The king, I think, [to ANNE or his brother.")],
    ]


def test_windows_line_ends_and_a_poem():
    assert dialogue.parse(PLAY.replace(b"\n", b"\r\n")) == dialogue.parse(PLAY)
    assert dialogue.parse(b"SONNETS\n\nI\n\nShall I compare thee\nto a summer's day?\n") == []


def test_make_examples():
    plays = {"play": dialogue.parse(PLAY)}
    pairs = [(row.prompt, row.reference) for row in dialogue.make_examples(plays)]
    assert pairs == [  # the last turn has a stray bracket
        ("Who is there?", "A friend: speak low. She goes."),
        ("A friend: speak low. She goes.", "My lord!"),
        ("My lord!", "What now?"),
    ]
    # at most three words: only "My lord!" -> "What now?"
    (short,) = dialogue.make_examples(plays, longest=3)
    assert short == (
        "My lord!",
        "What now?",
        {"work": "play", "scene": 0, "speakers": ("Mes", "BEN")},
    )


@given(st.text("AB.\n []iv", max_size=60))
def test_any_text(text):
    for scene in dialogue.parse(("ACT I\n\n" + text).encode()):
        assert scene and all(
            turn.speaker and turn.text == " ".join(turn.text.split()) for turn in scene
        )


@pytest.fixture(scope="module")
def real():
    try:
        return dialogue.load()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.ci
def test_real_plays(real):
    assert [len(part) for part in real] == [16389, 2128, 1958]
    scenes = [{(row.extra["work"], row.extra["scene"]) for row in part} for part in real]
    assert not scenes[0] & scenes[1] and not scenes[0] & scenes[2] and not scenes[1] & scenes[2]
    rows = [row for part in real for row in part]
    assert len({row.extra["work"] for row in rows}) == 37
    assert ("Long live the king!", "Bernardo?") in {(row.prompt, row.reference) for row in rows}
    assert max(len(text.split()) for row in rows for text in row[:2]) == 40
