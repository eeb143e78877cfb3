"""A language model with a value head as reward: trained on pairs or labels by `supervised`, read in the program."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxppo.types import Model, Params, RewardFn, Rollout


def last_value(
    model: Model, params: Params, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], *, dropout_key=None
) -> Float[Array, "B"]:
    """The value head's number at the last token of each text. The model reads text alone: no context is passed on to it."""
    hidden, _ = model.apply(params, tokens, mask, dropout_key=dropout_key)
    slots = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    last = jnp.where(mask, slots, 0).max(1)
    return jnp.take_along_axis(model.value(params, hidden), last[:, None], 1)[:, 0]


def reward(model: Model, *, scale: float = 1.0) -> RewardFn:
    """score = scale · value at the last token of prompt and response; the whole parameters stand in `frozen["reward"]`."""

    def fn(params: Params, rollout: Rollout):
        score = scale * last_value(model, params, rollout.tokens, rollout.attend)
        return score, jnp.isfinite(score)

    return fn
