"""Rewards of several parts, and of several tasks in one batch."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo.types import Params, RewardFn, Rollout

Weighted = Mapping[str, tuple[float, RewardFn]]


def weighted(parts: Weighted, *, columns: bool = False) -> RewardFn:
    """score = Σ weight · score of each part, or with `columns` the terms side by side,
    [B R]. A row is valid where all are.

    `params` holds the parameters of the parts by their names; a part without any may be
    left out.

    >>> import jax.numpy as jnp
    >>> number = lambda x: lambda params, rollout: (jnp.array([x]), jnp.array([True]))
    >>> weighted({"a": (2.0, number(3.0)), "b": (-1.0, number(1.0))})({}, None)[0].tolist()
    [5.0]
    """

    def fn(params: Params, rollout: Rollout):
        earned = {name: one(params.get(name, {}), rollout) for name, (_, one) in parts.items()}
        terms = jnp.stack(
            [weight * _summed(earned[name][0]) for name, (weight, _) in parts.items()], 1
        )
        valid = jnp.stack([good for _, good in earned.values()]).all(0)
        return terms if columns else terms.sum(1), valid

    return fn


def by_task(rewards: Sequence[RewardFn]) -> RewardFn:
    """Each row's score by the reward of its task, `extra["task"]` Int[B]. Another
    task's reward does not make it invalid; a task without a reward does.

    `params` holds the parameters of task 0 under "0", and so on; one without any may be
    left out. Every reward sees all rows: one on the host is asked about the other
    tasks' rows too, and its answers for them are not used.
    """

    def fn(params: Params, rollout: Rollout):
        earned = [one(params.get(str(task), {}), rollout) for task, one in enumerate(rewards)]
        scores, valid = (
            jnp.stack([_summed(score) for score, _ in earned]),
            jnp.stack([good for _, good in earned]),
        )
        own = rollout.extra["task"][None] == jnp.arange(len(rewards), dtype=jnp.int32)[:, None]
        return jnp.where(own, scores, 0.0).sum(0), (own & valid).any(0)

    return fn


def _summed(scores: Array) -> Float[Array, "B"]:
    """One number a row, of a reward with columns too."""
    return scores if scores.ndim == 1 else scores.sum(-1)
