"""A bandit whose paying arm is shown once: the smallest game of several turns.

The arms are letters; one of them pays. A turn is one byte, an arm. The answer to the
first turn is the letter of the paying arm if the turn was an arm, and "." otherwise;
later answers are always ".", so the letter has to be remembered. Each pull of the
paying arm has the reward 1/T, anything else 0.

The first pull is a guess, the others can be right: J = (1/k + T − 1) / T.
"""

import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxppo.environments import strings
from jaxppo.environments.text import Answer, Game, TextEnvironment, from_rows


def make_environment(arms: int, turns: int) -> TextEnvironment:
    """The game on instances {"arm": Int[B]}, from 0."""
    letters = string.ascii_lowercase[:arms]

    def step(arm: Array, text: strings.String, key: Array, turn: Array):
        pulled = strings.find(text, letters)
        shown = jnp.where((turn == 0) & (pulled >= 0), arm, arms)
        reward = jnp.where(pulled == arm, 1 / turns, 0.0)
        return arm, Answer(strings.choose(shown, letters + "."), reward, turn == turns - 1)

    return from_rows(
        lambda instance: instance["arm"],
        step,
        max_turns=turns,
        turn_length=1,
        reply_length=1,
        alphabet=f"{letters}.".encode(),
    )


def optimum(arms: int, turns: int) -> float:
    """The best expected return: J = (1/k + T − 1) / T.

    >>> optimum(2, 2)
    0.75
    """
    return (1 / arms + turns - 1) / turns


def make(arms: int = 2, turns: int = 2) -> Game:
    """The game with this many arms and pulls."""
    letters = string.ascii_lowercase[:arms]

    def instances(number: int, seed: int) -> list[dict[str, Any]]:
        drawn = np.random.default_rng(seed).integers(0, arms, number)
        return [{"prompt": letters, "arm": np.int32(x)} for x in drawn]

    def script(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        return replies[0] if replies else random(instance, replies, rng)

    def random(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        return str(rng.choice(list(letters)))

    return Game(make_environment(arms, turns), instances, script, random, optimum(arms, turns))
