"""Episodes of a run's policy."""

import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from jaxppo.environments import guess
from jaxppo.errors import UserError
from jaxppo.run import episodes
from jaxppo.types import Rollout

GAME = guess.make(n=9, guesses=2)


def a_rollout() -> Rollout:
    """Prompts of two slots; two turns of up to two tokens, with answers of up to three."""
    own = [[1, 1, 0, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    read = [[0, 0, 0, 1, 1, 0, 0, 0, 0, 0], [0] * 10]
    tokens = np.arange(24).reshape(2, 12)
    rewards = np.zeros((2, 10), np.float32)
    rewards[0, [1, 5]], rewards[1, 0] = (0.5, 1.0), np.nan
    zeros = np.zeros((2, 10), np.float32)
    attend = np.concatenate([[[0, 1], [1, 1]], np.array(own) | read], 1).astype(bool)
    return Rollout(
        tokens, attend, np.array(own, np.float32), np.array([True, False]),
        zeros, zeros, zeros, zeros, rewards=rewards,
    )  # fmt: skip


def test_episodes_as_texts():
    world = worlds.counting()._replace(max_turns=2, turn_length=2, observation_length=3)
    decode = lambda rows: [" ".join(map(str, row)) for row in rows]
    first, second = episodes.as_texts(a_rollout(), world, decode)
    # of row 0 the response begins with token 2: the turns in 2, 3 and 7, the answer in 5, 6
    assert first.instance == {"prompt": "1"} and first.turns == ["2 3", "7"]
    assert first.replies == ["5 6", ""] and first.rewards == [0.5, 1.0] and first.done
    assert (second.turns, second.replies, second.done) == (["14"], [""], False)
    assert second.instance == {"prompt": "12 13"} and np.isnan(second.score)


def test_the_length_of_an_episode():
    """2 turns of up to 3 bytes with answers of up to 7, on any tokens."""
    assert episodes.response_length(GAME) == episodes.response_length(GAME.environment) == 20
    assert episodes.response_length(worlds.counting()) == worlds.LENGTH


def test_what_an_environment_starts_from():
    columns = {"prompt": ["a", "b"], "number": [1, 2], "name": ["x", "y"], "size": [0.5, 1.5]}
    found = episodes.instances(columns, GAME)
    assert {name: x.tolist() for name, x in found.items()} == {"number": [1, 2], "size": [0.5, 1.5]}
    named = worlds.counting()._replace(reset=lambda instance, keys: instance["name"])
    with pytest.raises(UserError, match="'name', which has no number of 32 bits in row 0"):
        episodes.instances(columns, named)
    table = {1: 2}
    own = worlds.counting()._replace(reset=lambda instance, keys: jnp.zeros(table[5]))
    with pytest.raises(KeyError, match="5"):  # no column
        episodes.instances(columns, own)
