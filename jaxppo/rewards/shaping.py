"""From scores of whole responses to rewards of tokens.

Order: reference normalisation, clip, running, batch or task scale, then what a response
without an end of text gets instead, and what is taken off (no end of text, overlong).
Where a reward has several columns [B R] each is treated alike, and penalties are shared
among them: the sum is that of one column.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxppo import advantages, masked
from jaxppo.config import Config
from jaxppo.types import PyTree, Rollout, Scalar

Scores = Float[Array, "B"] | Float[Array, "B R"]


def token_rewards(
    scores: Float[Array, "B"],
    rollout: Rollout,
    *,
    kl_coef: Scalar,
    kl: Callable[[Array, Array], Array],
) -> Float[Array, "B T"]:
    """The score on the last acting token, minus the KL penalty on every acting token
    (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, eq. 2): r_t = 1[t = last]
    score − β KL_t.

    Shapes: scores [B] -> [B T], float32 and 0 where nothing was sampled. Rows without a
    token get nothing.
    """
    mask = rollout.mask
    # The last acting token, not the pad after it; from the mask, since pad may equal
    # the end of text.
    last = advantages.last_acting(mask)
    penalty = jnp.where(mask > 0, kl(rollout.raw_logprobs, rollout.ref_logprobs), 0.0)
    return jnp.where(last, scores[:, None], 0.0).astype(jnp.float32) - kl_coef * penalty


def shape(
    scores: Scores,
    rollout: Rollout,
    *,
    valid: Bool[Array, "B"],
    statistics: PyTree,
    config: Config,
    axis_name: str | None = None,
) -> tuple[Scores, PyTree]:
    """The configured shaping of raw scores; returns (scores, statistics). Invalid rows
    have score 0 and count nowhere.
    """
    shaped, statistics = shaper(
        scores, rollout, valid=valid, statistics=statistics, config=config, axis_name=axis_name
    )
    return shaped(scores, rollout, valid), statistics


def shaper(
    scores: Scores,
    rollout: Rollout,
    *,
    valid: Bool[Array, "B"],
    statistics: PyTree,
    config: Config,
    axis_name: str | None = None,
) -> tuple[Callable[[Scores, Rollout, Bool[Array, "B"]], Scores], PyTree]:
    """The configured shaping as a function of (scores, rollout, valid), on the scale
    that these scores have; and statistics with them in. Other responses to the same
    prompts go through the same function, and can be compared (a greedy baseline).
    """
    every = lambda valid: (
        valid if scores.ndim == 1 else jnp.broadcast_to(valid[:, None], scores.shape)
    )
    white_as = partial(
        masked.whiten_as,
        ddof=config.whiten_ddof,
        shift_mean=config.whiten_shift,
        axis_name=axis_name,
    )
    task_of = lambda rollout: rollout.extra["task"].reshape(-1, *[1] * (scores.ndim - 1))

    def unscaled(scores: Scores) -> Scores:
        out = scores * statistics["gain"] + _shared(statistics["bias"], scores)
        return (
            jnp.clip(out, -config.reward_clip, config.reward_clip)
            if config.reward_clip > 0
            else out
        )

    rows, known, after = every(valid), unscaled(scores), statistics
    scale = lambda x, rollout: x
    # the scale alone: a shift would reward or punish long life
    if config.reward_norm == "running":
        moments = masked.add_moments(statistics["reward"], known, rows, axis_name=axis_name)
        after = {**statistics, "reward": moments}
        scale = lambda x, rollout: x / moments.std()
    elif config.reward_norm == "batch":
        scale = lambda x, rollout: white_as(x, known, rows)
    elif config.reward_norm == "task":  # a row is of one task
        tasks, own = range(config.num_tasks), task_of(rollout)
        within = lambda x: [white_as(x, known, rows & (own == number)) for number in tasks]
        scale = lambda x, rollout: jnp.select(
            [task_of(rollout) == number for number in tasks], within(x)
        )

    def shaped(scores: Scores, rollout: Rollout, valid: Bool[Array, "B"]) -> Scores:
        out = scale(unscaled(masked.keep(scores, every(valid))), rollout)
        if config.missing_eos_score is not None:
            instead = _shared(jnp.asarray(config.missing_eos_score, out.dtype), out)
            out = jnp.where(rollout.finished.reshape(-1, *[1] * (out.ndim - 1)), out, instead)
        out = penalise_missing_eos(out, rollout, penalty=config.missing_eos_penalty)
        if config.overlong_buffer:
            out = penalise_overlong(
                out, rollout, buffer=config.overlong_buffer, penalty=config.overlong_penalty
            )
        return masked.keep(out, every(valid))

    return shaped, after


def init_statistics() -> dict:
    """Before the first step: nothing seen, gain 1 and bias 0, no moving baseline (its
    mean and weight).
    """
    number = lambda x: jnp.full((), x, jnp.float32)
    baseline = {"mean": number(0), "weight": number(0)}
    return {
        "reward": masked.no_moments(),
        "gain": number(1),
        "bias": number(0),
        "baseline": baseline,
    }


def normalise_to_reference(
    statistics: PyTree, scores: Float[Array, "N"], *, mean: float = 0.0, std: float = 1.0
) -> PyTree:
    """Statistics whose gain and bias give these scores, of the reference policy's
    samples, this mean and deviation (Ziegler et al. 2019, section 2.1): gain = std / σ,
    bias = mean − gain μ. Scores that are all alike keep gain 1.
    """
    good = jnp.isfinite(scores)
    moments = masked.add_moments(masked.no_moments(), jnp.where(good, scores, 0.0), good)
    gain = std / moments.std(ddof=0)
    return {
        **statistics,
        "gain": gain,
        "bias": jnp.asarray(mean - gain * moments.mean, jnp.float32),
    }


def penalise_missing_eos(scores: Scores, rollout: Rollout, *, penalty: Scalar) -> Scores:
    """scores − penalty where the response did not end by itself (known from `finished`,
    never from token ids).
    """
    return scores - _shared(penalty * (~rollout.finished).astype(scores.dtype), scores)


def penalise_overlong(scores: Scores, rollout: Rollout, *, buffer: int, penalty: Scalar) -> Scores:
    """scores − penalty · clip((n − (T − buffer)) / buffer, 0, 1), n tokens of at most T
    (DAPO, https://arxiv.org/abs/2503.14476).
    """
    length = rollout.mask.shape[1]
    over = (rollout.mask.sum(1) - (length - buffer)) / buffer
    return scores - _shared(penalty * jnp.clip(over, 0.0, 1.0), scores)


def _shared(amount: Array, scores: Array) -> Array:
    """What the whole response gets, [B] or one number for all: in equal parts on each
    column.
    """
    return (
        amount
        if scores.ndim == 1
        else jnp.broadcast_to(amount[..., None] / scores.shape[1], scores.shape)
    )


def informative(
    scores: Float[Array, "B"], valid: Bool[Array, "B"], *, group_size: int
) -> Bool[Array, "B"]:
    """True on the valid rows of groups whose valid scores differ: the others have
    advantage 0 in every group estimator.

    >>> import jax.numpy as jnp
    >>> informative(jnp.array([1.0, 1.0, 1.0, 2.0]), jnp.ones(4, bool), group_size=2)
    Array([False, False,  True,  True], dtype=bool)
    """
    grouped, ok = scores.reshape(-1, group_size), valid.reshape(-1, group_size)
    most = jnp.where(ok, grouped, -jnp.inf).max(1, keepdims=True)
    least = jnp.where(ok, grouped, jnp.inf).min(1, keepdims=True)
    return (ok & (most > least)).reshape(-1)


def first_groups(useful: Bool[Array, "B"], *, group_size: int, rows: int) -> Int[Array, "K"]:
    """Row numbers of the first `rows` rows in whole groups, useful groups before the
    others, each kind in its order.

    >>> import jax.numpy as jnp
    >>> first_groups(jnp.array([False, False, True, True]), group_size=2, rows=2)
    Array([2, 3], dtype=int32)
    """
    groups = useful.reshape(-1, group_size).any(1)
    order = jnp.argsort(~groups, stable=True)[: rows // group_size].astype(jnp.int32)
    return (order[:, None] * group_size + jnp.arange(group_size, dtype=jnp.int32)[None]).reshape(-1)


def take_rows(tree, rows: Int[Array, "K"]):
    """The rows of every array in the tree."""
    return jax.tree.map(lambda x: x[rows], tree)
