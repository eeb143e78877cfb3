"""Combine rewards: weighted sums of several, and one per task in a mixed batch."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from jaxppo.rewards.shaping import row_scores
from jaxppo.types import Params, RewardFn, Rollout

Weighted = Mapping[str, tuple[float, RewardFn]]


def weighted_sum(parts: Weighted) -> RewardFn:
    """score = Σ weight · score of each part.

    A row is valid where all parts are. `params` maps names of parts to their
    parameters; parts without parameters may be missing.

    >>> constant = lambda x: lambda params, rollout: (jnp.array([x]), jnp.array([True]))
    >>> reward = weighted_sum({"a": (2.0, constant(3.0)), "b": (-1.0, constant(1.0))})
    >>> reward({}, None)[0].tolist()
    [5.0]
    """

    def fn(params: Params, rollout: Rollout):
        terms, valid = [], []
        for name, (weight, reward) in parts.items():
            scores, good = reward(params.get(name, {}), rollout)
            terms.append(weight * row_scores(scores))
            valid.append(good)
        return jnp.stack(terms, 1).sum(1), jnp.stack(valid).all(0)

    return fn


def by_task(rewards: Sequence[RewardFn]) -> RewardFn:
    """Score each row by the reward of its task, `extra["task"]` Int[B].

    A row of a task without a reward is invalid. `params` maps "0", "1", ... to the
    parameters of each task's reward; rewards without parameters may be missing. Every
    reward is called with all rows; its scores for other tasks' rows are ignored.
    """

    def fn(params: Params, rollout: Rollout):
        found = [reward(params.get(str(n), {}), rollout) for n, reward in enumerate(rewards)]
        scores = jnp.stack([row_scores(scores) for scores, _ in found])
        valid = jnp.stack([good for _, good in found])
        own = rollout.extra["task"][None] == jnp.arange(len(rewards), dtype=jnp.int32)[:, None]
        return jnp.where(own, scores, 0.0).sum(0), (own & valid).any(0)

    return fn
