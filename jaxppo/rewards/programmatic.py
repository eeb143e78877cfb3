"""Rewards written in JAX on token ids: part of the program, nothing leaves the device."""

import jax.numpy as jnp
from jaxtyping import Int

from jaxppo.types import RewardFn, Rollout


def count_token(token: Int | int) -> RewardFn:
    """score = number of times `token` was sampled in the response."""

    def reward(params, rollout: Rollout):
        del params
        hits = (rollout.response == token) & (rollout.mask > 0)
        return hits.sum(1).astype(jnp.float32), jnp.ones(hits.shape[:1], bool)

    return reward
