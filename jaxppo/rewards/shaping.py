"""Turn scores of responses into rewards of tokens.

Order: normalise to the reference, clip, scale (running, batch or task), replace the
score of unfinished responses, subtract penalties (missing end of text, overlong).
Scores may have columns, [B R]: each is shaped alike, and penalties are divided among
them, so that their sum is shaped like a single score.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxppo import advantages, masked
from jaxppo.config import Config
from jaxppo.types import PyTree, Rollout, Scalar

Scores = Float[Array, "B"] | Float[Array, "B R"]
Shaper = Callable[[Scores, Rollout, Bool[Array, "B"]], Scores]


def row_scores(scores: Scores) -> Float[Array, "B"]:
    """One score a response: the sum of its columns."""
    return scores if scores.ndim == 1 else scores.sum(-1)


def weight_columns(scores: Scores, weights: Sequence[tuple[str, float]]) -> Scores:
    """Multiply each column of the scores by its weight, in the order of the names.

    >>> weights = (("right", 1.0), ("short", 0.5))
    >>> weight_columns(jnp.array([[2.0, 3.0]]), weights).tolist()
    [[2.0, 1.5]]
    """
    if not weights:
        return scores
    return scores * jnp.array([weight for _, weight in weights], scores.dtype)[None]


def token_rewards(
    scores: Float[Array, "B"],
    rollout: Rollout,
    *,
    kl_coef: Scalar,
    kl: Callable[[Array, Array], Array],
) -> Float[Array, "B T"]:
    """Put the score on the last acting token and the KL penalty on every acting token:
    r_t = 1[t = last] score − β KL_t
    (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, eq. 2).

    The rewards of an environment's turns stay where they are; what the score has more
    or less than their sum (shaping, penalties) is on the last acting token. Rewards are
    float32, and 0 where nothing was sampled.
    """
    mask = rollout.mask
    # from the mask: the pad token may be the end of text
    last = advantages.last_acting(mask)
    penalty = jnp.where(mask > 0, kl(rollout.raw_logprobs, rollout.ref_logprobs), 0.0)
    given = jnp.zeros_like(mask) if rollout.rewards is None else rollout.rewards
    rewards = given + jnp.where(last, (scores - given.sum(1))[:, None], 0.0)
    dtype = jnp.float64 if scores.dtype == jnp.float64 else jnp.float32
    return rewards.astype(dtype) - kl_coef * penalty


def make_shaper(
    scores: Scores,
    rollout: Rollout,
    *,
    valid: Bool[Array, "B"],
    statistics: PyTree,
    config: Config,
    axis_name: str | None = None,
    longest: int | None = None,
) -> tuple[Shaper, PyTree]:
    """Return (shaper, new statistics).

    `shaper(scores, rollout, valid)` gives shaped scores on the scale of the scores
    passed here, so that other responses to the same prompts are comparable (a greedy
    baseline). Invalid rows get 0 and count in no statistic.

    longest: most tokens that may be sampled in a row (None: T).
    """

    def per_column(valid: Bool[Array, "B"]):
        return valid if scores.ndim == 1 else jnp.broadcast_to(valid[:, None], scores.shape)

    def normalise(scores: Scores) -> Scores:
        out = scores * statistics["gain"] + _divide(statistics["bias"], scores)
        limit = config.reward_clip
        return jnp.clip(out, -limit, limit) if limit > 0 else out

    rows, normalised, after = per_column(valid), normalise(scores), statistics
    whiten = partial(
        masked.whiten_as,
        ddof=config.whiten_ddof,
        shift_mean=config.whiten_shift,
        axis_name=axis_name,
    )
    scale = lambda x, rollout: x
    if config.reward_norm == "running":
        moments = masked.add_moments(statistics["reward"], normalised, rows, axis_name=axis_name)
        after = {**statistics, "reward": moments}
        # no shift: it would reward or punish long episodes
        scale = lambda x, rollout: x / moments.std()
    elif config.reward_norm == "batch":
        scale = lambda x, rollout: whiten(x, normalised, rows)
    elif config.reward_norm == "task":
        task_of = lambda rollout: rollout.extra["task"].reshape(-1, *[1] * (scores.ndim - 1))
        tasks, own = range(config.num_tasks), task_of(rollout)
        scale = lambda x, rollout: jnp.select(
            [task_of(rollout) == task for task in tasks],
            [whiten(x, normalised, rows & (own == task)) for task in tasks],
        )

    def shaper(scores: Scores, rollout: Rollout, valid: Bool[Array, "B"]) -> Scores:
        out = scale(normalise(masked.keep(scores, per_column(valid))), rollout)
        if config.missing_eos_score is not None:
            replacement = _divide(jnp.asarray(config.missing_eos_score, out.dtype), out)
            finished = rollout.finished.reshape(-1, *[1] * (out.ndim - 1))
            out = jnp.where(finished, out, replacement)
        out = penalise_missing_eos(out, rollout, penalty=config.missing_eos_penalty)
        if config.overlong_buffer:
            out = penalise_overlong(
                out,
                rollout,
                buffer=config.overlong_buffer,
                penalty=config.overlong_penalty,
                longest=longest,
            )
        return masked.keep(out, per_column(valid))

    return shaper, after


def init_statistics() -> dict:
    """Return the statistics before the first step: no scores seen, gain 1, bias 0, and
    an empty moving baseline.
    """
    number = lambda x: jnp.full((), x, jnp.float32)
    return {
        "reward": masked.no_moments(),
        "gain": number(1),
        "bias": number(0),
        "baseline": {"mean": number(0), "weight": number(0)},
    }


def normalise_to_reference(statistics: PyTree, scores: Float[Array, "N"]) -> PyTree:
    """Set gain and bias so that the reference policy's scores get mean 0 and
    deviation 1: gain = 1 / σ, bias = −gain μ (Ziegler et al. 2019, section 2.1).

    The gain stays 1 when all scores are equal.
    """
    good = jnp.isfinite(scores)
    moments = masked.add_moments(masked.no_moments(), jnp.where(good, scores, 0.0), good)
    gain = 1 / moments.std(ddof=0)
    return {**statistics, "gain": gain, "bias": -gain * moments.mean}


def penalise_missing_eos(scores: Scores, rollout: Rollout, *, penalty: Scalar) -> Scores:
    """Subtract the penalty where the response has no end of text (by `finished`, never
    by token ids).
    """
    return scores - _divide(penalty * (~rollout.finished).astype(scores.dtype), scores)


def penalise_overlong(
    scores: Scores, rollout: Rollout, *, buffer: int, penalty: Scalar, longest: int | None = None
) -> Scores:
    """Subtract penalty · clip((n − (T − buffer)) / buffer, 0, 1) for n of at most T, or
    `longest`, tokens (DAPO, https://arxiv.org/abs/2503.14476).
    """
    length = rollout.mask.shape[1] if longest is None else longest
    over = (rollout.mask.sum(1) - (length - buffer)) / buffer
    return scores - _divide(penalty * jnp.clip(over, 0.0, 1.0), scores)


def _divide(amount: Array, scores: Array) -> Array:
    """Divide an amount per row, [B] or [], equally among the columns of the scores."""
    if scores.ndim == 1:
        return amount
    return jnp.broadcast_to(amount[..., None] / scores.shape[1], scores.shape)


def informative(
    scores: Float[Array, "B"], valid: Bool[Array, "B"], *, group_size: int
) -> Bool[Array, "B"]:
    """Mark the valid rows of groups whose valid scores differ. Every group estimator
    gives the others advantage 0.

    >>> informative(jnp.array([1.0, 1.0, 1.0, 2.0]), jnp.ones(4, bool), group_size=2)
    Array([False, False,  True,  True], dtype=bool)
    """
    grouped, ok = scores.reshape(-1, group_size), valid.reshape(-1, group_size)
    most = jnp.where(ok, grouped, -jnp.inf).max(1, keepdims=True)
    least = jnp.where(ok, grouped, jnp.inf).min(1, keepdims=True)
    return (ok & (most > least)).reshape(-1)


def first_groups(useful: Bool[Array, "B"], *, group_size: int, rows: int) -> Int[Array, "K"]:
    """Return the row numbers of whole groups, `rows` in all: groups with useful rows
    first, otherwise in order.

    >>> first_groups(jnp.array([False, False, True, True]), group_size=2, rows=2)
    Array([2, 3], dtype=int32)
    """
    groups = useful.reshape(-1, group_size).any(1)
    order = jnp.argsort(~groups, stable=True)[: rows // group_size].astype(jnp.int32)
    return (order[:, None] * group_size + jnp.arange(group_size, dtype=jnp.int32)[None]).reshape(-1)
