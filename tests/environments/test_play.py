"""Episodes on the host."""

import numpy as np
import pytest

from jaxppo.environments import guess
from jaxppo.environments.play import play

GAME = guess.make(n=10, guesses=3)
INSTANCES = [{"prompt": "1-10\n", "number": np.int32(x)} for x in (4, 10)]


def test_an_episode_as_text():
    scripted = iter(["9\n", "9\n", "x\n", "10\n", "4\n"])  # row by row, turn by turn
    first, second = play(GAME, INSTANCES, lambda *_: next(scripted))
    assert first.turns == ["9\n", "x\n", "4\n"]
    assert first.replies == ["lower\n", "?\n", "right\n"]
    assert first.text == "1-10\n9\nlower\nx\n?\n4\nright\n"
    assert (first.rewards, first.score, first.done) == ([0, 0, 1], 1, True)
    # it is over after two turns and not asked again
    assert (second.turns, second.rewards) == (["9\n", "10\n"], [0, 1])


def test_what_a_player_sees():
    """The instance, the replies of its own row, and numbers of its own."""
    seen = []

    def player(instance, replies, rng):
        seen.append((int(instance["number"]), replies, rng.random()))
        return "1\n"

    play(GAME, INSTANCES, player)
    assert [x[:2] for x in seen[:4]] == [(4, ()), (10, ()), (4, ("higher\n",)), (10, ("higher\n",))]
    assert len({x[2] for x in seen}) == len(seen) == 6
    before = [x[2] for x in seen]
    play(GAME, INSTANCES, player)
    play(GAME, INSTANCES, player, seed=1)
    after = [x[2] for x in seen[6:]]
    assert after[:6] == before and not set(after[6:]) & set(before)


def test_an_environment_alone_needs_a_player():
    with pytest.raises(ValueError, match="give a player"):
        play(GAME.environment, INSTANCES)
    assert play(GAME.environment, INSTANCES, GAME.script) == play(GAME, INSTANCES)


def test_a_long_turn_is_cut():
    """W = 4 bytes are read: "0004", and not the 4 behind them."""
    assert GAME.environment.turn_length == 4
    first, _ = play(GAME, INSTANCES, lambda *_: "00044\n")
    assert first.replies == ["right\n"]
