"""Games and tools that answer the policy: episodes of several turns, inside the
program.

`ENVIRONMENTS[name](**options)` makes a `text.Game`, and `text.on_bytes` puts it on the
tokens of a vocabulary.
"""

from collections.abc import Callable

from jaxppo.environments import bandit_with_memory, calculator, guess, maze, tic_tac_toe, wordle
from jaxppo.environments.text import Game

ENVIRONMENTS: dict[str, Callable[..., Game]] = {
    "bandit_with_memory": bandit_with_memory.make,
    "calculator": calculator.make,
    "guess": guess.make,
    "maze": maze.make,
    "tic_tac_toe": tic_tac_toe.make,
    "wordle": wordle.make,
}
