"""Words by the feedback of letters."""

import functools
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.environments import wordle
from jaxppo.environments.play import play

FEW = st.text("abc", min_size=5, max_size=5)  # letters that occur several times
mark = jax.jit(wordle.mark)


def of(word: str) -> np.ndarray:
    return np.frombuffer(word.encode(), np.uint8)


def mark_text(guess: str, word: str) -> str:
    """The answer by the rules, with a list of the letters that are left."""
    marks, left = ["-"] * 5, list(word)
    for i in range(5):
        if guess[i] == word[i]:
            marks[i] = "g"
            left.remove(guess[i])
    for i in range(5):
        if marks[i] == "-" and guess[i] in left:
            marks[i] = "y"
            left.remove(guess[i])
    return "".join(marks)


@functools.cache
def games(guesses: int):
    return wordle.make(words=60, guesses=guesses)


@pytest.mark.parametrize(
    ("guess", "word", "expected"),
    [
        ("queen", "queen", "ggggg"),
        ("eerie", "queen", "yy---"),  # two e of the word, three of the guess
        ("speed", "abide", "--y-y"),  # one e: the first is yellow, the second is not
        ("speed", "erase", "y-yy-"),  # two e
        ("speed", "steal", "g-g--"),  # the green e is counted first
        ("allay", "label", "yyy--"),
        ("llama", "label", "gyy--"),
    ],
)
def test_letters_that_occur_several_times(guess, word, expected):
    """By the rules of the game, here and in the program."""
    assert mark_text(guess, word) == expected
    assert "".join("-yg"[x] for x in mark(of(guess), of(word))) == expected


@given(FEW, FEW)
def test_the_program_marks_by_the_rules(guess, word):
    marks = "".join("-yg"[x] for x in mark(of(guess), of(word)))
    assert marks == mark_text(guess, word)
    # of a letter as many are marked as both words have
    marked = Counter(x for x, y in zip(guess, marks, strict=True) if y != "-")
    assert marked == Counter(guess) & Counter(word)


def test_the_words():
    assert all(len(x) == 5 and x.isascii() and x.islower() for x in wordle.WORDS)
    assert list(wordle.WORDS) == sorted(set(wordle.WORDS)) and len(wordle.WORDS) == 366


@pytest.mark.parametrize("guesses", [1, 2, 3, 6])
def test_the_score_of_the_reference(guesses):
    """The table of the strategy, and the strategy played on every word."""
    game = games(guesses)
    every = wordle.choose_words(60)
    played = play(game, [{"prompt": "", "word": of(word)} for word in every])
    assert sum(x.score for x in played) == round(60 * game.optimum)


def test_the_scores_grow_to_all_words():
    scores = [round(60 * games(guesses).optimum) for guesses in (1, 2, 3, 6)]
    assert scores[0] == 1 and scores == sorted(scores) and scores[-1] == 60


@pytest.mark.parametrize(
    ("turn", "reply"),
    [
        ("house\n", "ggggg\n"),
        ("  house", "?\n"),  # six bytes are read
        ("hxuse\n", "g-ggg\n"),  # no word, but five letters
        ("hous\n", "?\n"),
        ("House\n", "?\n"),
        ("houses\n", "?\n"),
        ("hou e\n", "?\n"),
        ("", "?\n"),
    ],
)
def test_answers(turn, reply):
    (episode,) = play(games(2), [{"prompt": "", "word": of("house")}], lambda *_: turn)
    assert episode.replies[0] == reply and episode.rewards[0] == (reply == "ggggg\n")
    assert len(episode.turns) == (1 if episode.rewards[0] else 2)
