"""Guess a number between 1 and N: the environment answers "higher" or "lower".

A turn is an integer on a line. The right one ends the episode with the reward 1, any
other one has the reward 0. A turn that is no integer is answered with "?", and costs a
guess.

The best policy halves the range. With k guesses it finds each of 2ᵏ − 1 numbers, and no
policy finds more: W(N, k) = min(N, 2ᵏ − 1) / N.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxppo.environments import strings
from jaxppo.environments.text import Answer, Game, TextEnvironment, from_rows

REPLIES = ("right\n", "higher\n", "lower\n", "?\n")


def make_environment(n: int, guesses: int) -> TextEnvironment:
    """The game on instances {"number": Int[B]}."""

    def step(number: Array, text: strings.String, key: Array, turn: Array):
        guess, readable = strings.parse_integer(strings.first_line(text))
        found = readable & (guess == number)
        reply = jnp.where(found, 0, jnp.where(guess < number, 1, 2))
        reply = strings.choose(jnp.where(readable, reply, 3), REPLIES)
        return number, Answer(reply, found.astype(jnp.float32), found)

    return from_rows(
        lambda instance: instance["number"],
        step,
        max_turns=guesses,
        turn_length=len(f"{n}\n") + 1,
        reply_length=len("higher\n"),
        alphabet=bytes(sorted(set("".join(REPLIES).encode()))),
    )


def make_instances(n: int, number: int, seed: int) -> list[dict[str, Any]]:
    """`number` instances, each with a number drawn from 1..n."""
    drawn = np.random.default_rng(seed).integers(1, n, number, endpoint=True)
    return [{"prompt": f"1-{n}\n", "number": np.int32(x)} for x in drawn]


def bisect(n: int, replies: Sequence[str]) -> str:
    """The middle of the numbers that the replies to this strategy leave."""
    low, high = 1, n
    for reply in replies:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if reply == "higher\n" else (low, middle - 1)
    return f"{(low + high) // 2}\n"


def win_rate(n: int, guesses: int) -> float:
    """The share of numbers that the best policy finds: W(N, k) = min(N, 2ᵏ − 1) / N.

    >>> win_rate(100, 6)
    0.63
    """
    return min(n, 2**guesses - 1) / n


def make(n: int = 20, guesses: int = 4) -> Game:
    """The game with numbers from 1 to n; the optimum is the win rate of bisection."""

    def script(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        return bisect(n, replies)

    def random(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        return f"{rng.integers(1, n, endpoint=True)}\n"

    return Game(
        make_environment(n, guesses),
        lambda number, seed: make_instances(n, number, seed),
        script,
        random,
        win_rate(n, guesses),
    )
