"""Numbers by "higher" and "lower"."""

import functools

import numpy as np
import pytest

from jaxppo.environments import guess
from jaxppo.environments.play import play


@functools.cache
def most_found(n: int, guesses: int) -> int:
    """How many of n numbers the best policy finds, by trying every first guess: it depends on how
    many numbers are left on each side.
    """
    if n == 0 or guesses == 0:
        return 0
    return max(
        1 + most_found(x, guesses - 1) + most_found(n - 1 - x, guesses - 1) for x in range(n)
    )


@pytest.mark.parametrize("guesses", range(1, 6))
def test_the_closed_form_is_the_best_of_all_policies(guesses):
    for n in range(1, 40):
        assert guess.win_rate(n, guesses) == most_found(n, guesses) / n


@pytest.mark.ci
@pytest.mark.parametrize(("n", "guesses"), [(1, 1), (7, 3), (20, 4), (100, 6)])
def test_bisection_on_every_number_reaches_it(n, guesses):
    game = guess.make(n, guesses)
    every = [{"prompt": "", "number": np.int32(x)} for x in range(1, n + 1)]
    played = play(game, every)
    assert np.mean([x.score for x in played]) == game.optimum == min(n, 2**guesses - 1) / n
    assert all(len(x.turns) <= guesses for x in played)


@pytest.mark.parametrize(
    ("turn", "reply", "reward"),
    [
        ("7\n", "right\n", 1),
        (" 7", "right\n", 1),
        ("07\n", "right\n", 1),
        ("6\n", "higher\n", 0),
        ("-7\n", "higher\n", 0),
        ("99\n", "lower\n", 0),
        ("", "?\n", 0),
        ("\n7\n", "?\n", 0),
        ("x\n", "?\n", 0),
        ("7 7", "?\n", 0),
    ],
)
def test_answers(turn, reply, reward):
    game = guess.make(20, 2)
    (episode,) = play(game, [{"prompt": "", "number": np.int32(7)}], lambda *_: turn)
    assert (episode.replies[0], episode.rewards[0]) == (reply, reward)
    assert len(episode.turns) == (1 if reward else 2) and episode.done


def test_instances_are_uniform():
    game = guess.make(4, 1)
    drawn = [int(x["number"]) for x in game.instances(4000, 0)]
    count = np.bincount(drawn, minlength=5)  # 1000 each, with a deviation of 27
    assert count[0] == 0 and len(count) == 5 and (abs(count[1:] - 1000) < 110).all()
    assert game.instances(1, 0)[0]["prompt"] == "1-4\n"
