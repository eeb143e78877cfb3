"""Small environments for tests."""

import jax
import jax.numpy as jnp

from jaxppo.types import Environment, Observation

TURN, ANSWER = 3, 2
TURNS = 3
LENGTH = TURNS * (TURN + ANSWER)


def counting(
    *, turns: int = TURNS, tokens=None, length=None, reward=None, done=None
) -> Environment:
    """Rewards the tokens of a turn that are 3, and answers with its first token, twice if that is
    even. A row is done after one to three turns, by the column `turns` or chance. Arguments replace
    a part of the answer: functions of (state, turn), the key of the row in the state.
    """

    def reset(instance, keys):
        chance = jax.vmap(lambda key: jax.random.randint(key, (), 1, TURNS + 1))(keys)
        return {"turn": jnp.zeros_like(chance), "last": instance.get("turns", chance), "key": keys}

    def step(state, turn):
        own = jnp.arange(TURN)[None] < turn.length[:, None]
        first = turn.tokens[:, 0]
        state = {**state, "turn": state["turn"] + 1}
        found = {
            "tokens": jnp.stack([first, (first + 1) % 11], 1),
            "length": jnp.where(first % 2 == 0, 2, 1),
            "reward": ((turn.tokens == 3) & own).sum(1).astype(jnp.float32),
            "done": state["turn"] >= state["last"],
        }
        given = {"tokens": tokens, "length": length, "reward": reward, "done": done}
        found |= {name: x(state, turn) for name, x in given.items() if x is not None}
        return state, Observation(**found)

    return Environment(reset, step, turns, TURN, ANSWER)


def by_chance(state, turn):
    """Answers of any tokens, drawn anew in each row and turn."""
    draw = lambda key, turn: jax.random.randint(jax.random.fold_in(key, turn), (ANSWER,), 2, 11)
    return jax.vmap(draw)(state["key"], state["turn"])
