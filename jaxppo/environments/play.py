"""Play whole episodes on the host, with texts: what a script, a person or a test says
goes through the same step as in training.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxppo.environments.strings import table
from jaxppo.environments.text import Game, Player, TextEnvironment, stack


class Episode(NamedTuple):
    """An episode as texts. The lists have an entry for each turn."""

    instance: Mapping[str, Any]
    turns: list[str]
    replies: list[str]
    rewards: list[float]
    done: bool

    @property
    def score(self) -> float:
        """The return: the sum of the rewards."""
        return sum(self.rewards)

    @property
    def text(self) -> str:
        """The prompt, then turns and replies one behind the other."""
        pairs = zip(self.turns, self.replies, strict=True)
        return self.instance["prompt"] + "".join(turn + reply for turn, reply in pairs)


def play(
    game: Game | TextEnvironment,
    instances: Sequence[Mapping[str, Any]],
    player: Player | None = None,
    *,
    seed: int = 0,
) -> list[Episode]:
    """Play an episode on each instance, all of them at once.

    Args:
      player: `player(instance, replies so far, generator)` returns the text of the next
        turn, of which `turn_length` bytes are read; the game's script by default. Each
        row has a generator of its own.
      seed: of the environment and of the generators.
    """
    environment = game if isinstance(game, TextEnvironment) else game.environment
    if player is None:
        if isinstance(game, TextEnvironment):
            raise ValueError("an environment alone has no script; give a player")
        player = game.script
    rows = len(instances)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    generators = [np.random.default_rng([seed, row]) for row in range(rows)]
    state = jax.jit(environment.reset)(stack(instances), keys)
    step, over = jax.jit(environment.step), np.zeros(rows, bool)
    episodes = [Episode(instance, [], [], [], False) for instance in instances]
    for _ in range(environment.max_turns):
        said = [
            "" if done else player(x.instance, tuple(x.replies), rng)
            for x, rng, done in zip(episodes, generators, over, strict=True)
        ]
        cut = [text.encode()[: environment.turn_length] for text in said]
        state, reply = step(state, *table(cut, environment.turn_length))
        text, length, reward, done = map(
            np.asarray, (reply.text, reply.length, reply.reward, reply.done)
        )
        for row in np.flatnonzero(~over):
            shown = bytes(text[row, : length[row]]).decode(errors="replace")
            episodes[row].turns.append(said[row])
            episodes[row].replies.append(shown)
            episodes[row].rewards.append(float(reward[row]))
        over = over | done
        if over.all():
            break
    return [x._replace(done=bool(done)) for x, done in zip(episodes, over, strict=True)]
