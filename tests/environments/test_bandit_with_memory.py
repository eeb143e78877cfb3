"""The smallest game, whose episodes can be counted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo.environments import bandit_with_memory
from jaxppo.environments.play import play
from jaxppo.environments.text import on_bytes, tables_of
from jaxppo.types import Turn


def best_return(arms: int, turns: int) -> float:
    """By brute force: over a tree of what was pulled and seen, with all arms as likely."""
    letters = [*"abcdef"[:arms], "x"]

    def value(possible: tuple[int, ...], turn: int) -> float:
        """The summed return over the arms that may pay."""
        if turn == turns:
            return 0.0
        found = []
        for i, letter in enumerate(letters):
            now = (i in possible) / turns
            if turn == 0 and letter != "x":  # the answer says which one it is
                found.append(now + sum(value((arm,), 1) for arm in possible))
            else:
                found.append(now + value(possible, turn + 1))
        return max(found)

    return value(tuple(range(arms)), 0) / arms


@pytest.mark.parametrize(("arms", "turns"), [(k, t) for k in (1, 2, 3) for t in (1, 2, 3)])
def test_the_closed_form(arms, turns):
    assert bandit_with_memory.optimum(arms, turns) == pytest.approx(best_return(arms, turns))


@pytest.mark.ci
def test_every_episode_of_two_turns_of_one_token():
    """A vocabulary of four tokens: a, b, "." and one that writes nothing; 2 · 4² episodes."""
    world = on_bytes(
        bandit_with_memory.make(arms=2, turns=2).environment, tables_of([b"a", b"b", b".", b""])
    )
    assert world[2:] == (2, 1, 1) and world.length == 4
    episodes = np.array(list(itertools.product(range(2), range(4), range(4))), np.int32)
    arm, first, second = jnp.asarray(episodes.T)
    one = jnp.ones(32, jnp.int32)
    state = world.reset({"arm": arm}, jax.random.split(jax.random.key(0), 32))
    state, seen = world.step(state, Turn(first[:, None], one))
    assert seen.tokens[:, 0].tolist() == np.where(first < 2, arm, 2).tolist()
    assert seen.length.tolist() == [1] * 32 and not seen.done.any()
    _, last = world.step(state, Turn(second[:, None], one))
    assert last.done.all()
    expected = ((first == arm) + (second == arm).astype(jnp.float32)) / 2
    np.testing.assert_array_equal(seen.reward + last.reward, expected)
    # the best policy: any arm, then the letter that was shown
    best = (episodes[:, 1] == 0) & (episodes[:, 2] == episodes[:, 0])
    assert expected[best].mean() == 0.75


def test_the_arm_is_shown_once():
    game = bandit_with_memory.make(arms=3, turns=4)
    said = iter("abcb")
    (episode,) = play(game, [{"prompt": "abc", "arm": np.int32(1)}], lambda *_: next(said))
    assert episode.replies == ["b", ".", ".", "."]
    assert episode.rewards == [0, 0.25, 0, 0.25] and episode.done


def test_a_first_turn_that_is_no_arm_shows_nothing():
    game = bandit_with_memory.make(arms=3, turns=2)
    (episode,) = play(game, [{"prompt": "abc", "arm": np.int32(1)}], lambda *_: "d")
    assert (episode.replies, episode.score) == ([".", "."], 0)
