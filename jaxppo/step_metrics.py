"""The metrics of a train step, computed inside its program: means over all devices, and
some responses for the log.
"""

import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import masked
from jaxppo.config import Config
from jaxppo.rewards import shaping
from jaxppo.rewards.shaping import row_scores
from jaxppo.types import Batch, Parts, Rollout
from jaxppo.update import ratio_off


def score_metrics(
    raw: Array,
    scores: Array,
    rolled: Rollout,
    valid: Array,
    parts: Parts,
    config: Config,
    axis_name: str | None,
) -> dict:
    """Means over valid rows: reward (of each task, too), each named score, length,
    share of finished rows; how much the rewards differ; and `first_samples`.
    """
    measured = valid & (rolled.mask.sum(1) > 0)
    mean = lambda x, rows=measured: masked.mean(x, rows, axis_name=axis_name)
    rewards = row_scores(scores)
    metrics = {
        "reward": mean(rewards),
        "reward_std": jnp.sqrt(masked.var(rewards, measured, axis_name=axis_name)),
        "length": mean(rolled.mask.sum(1)),
        "finished": mean(rolled.finished.astype(jnp.float32)),
    }
    for column, (name, _) in enumerate(parts.score_weights):
        metrics[f"score_{name}"] = mean(raw[:, column])
    for task in range(config.num_tasks) if config.num_tasks > 1 else ():
        rows = measured & (rolled.extra["task"] == task)
        metrics[f"reward_{task}"] = mean(rewards, rows)
    if config.group_size > 1:
        useful = shaping.informative(rewards, valid, group_size=config.group_size)
        metrics["informative"] = masked.mean(useful, jnp.ones_like(useful), axis_name=axis_name)
    if config.log_samples:
        metrics["samples"] = first_samples(raw, rolled, config)
    return metrics


def first_samples(raw: Array, rolled: Rollout, config: Config) -> Array:
    """The first response to each of the first `log_samples` prompts (of this device,
    under pmap), to be logged as text: Float[K L + R], token ids, -1 for padding, -2 - i
    for a token i of an environment's answer, and the raw scores. One sum over rows
    selects them, so a mesh needs one small all-reduce.
    """
    before = rolled.tokens.shape[1] - rolled.mask.shape[1]
    own = jnp.pad(rolled.mask > 0, ((0, 0), (before, 0)), constant_values=True)
    tokens = jnp.where(own, rolled.tokens, -2 - rolled.tokens)
    tokens = jnp.where(rolled.attend, tokens, -1).astype(jnp.float32)  # exact to 2^24
    rows = jnp.concatenate([tokens, raw.reshape(len(raw), -1)], 1)
    number = min(config.log_samples, len(raw) // config.group_size)
    chosen = config.group_size * jnp.arange(number)[:, None] == jnp.arange(len(raw))[None]
    return jnp.where(chosen[:, :, None], rows[None], 0.0).sum(1)


def response_mean(x: Array, rolled: Rollout, valid: Array, axis_name: str | None) -> Array:
    """The sum of x [B T] over a response, as a mean over valid responses."""
    measurable = valid & (rolled.mask.sum(1) > 0)
    return masked.mean((x * rolled.mask).sum(1), measurable, axis_name=axis_name)


def batch_metrics(batch: Batch, axis_name: str | None) -> dict:
    """The spread of the advantages, how good the critic is and, with a scorer's
    log-probs, how far they are from the sampler's.
    """
    mask, rolled = batch.mask, batch.rollout
    metrics = {
        "advantage_std": jnp.sqrt(masked.var(batch.advantages, mask, axis_name=axis_name)),
        "explained_variance": explained_variance(
            batch.returns, rolled.values, mask, axis_name=axis_name
        ),
    }
    if rolled.old_logprobs is not None:
        off = ratio_off(rolled.old_logprobs, rolled.logprobs, rolled.mask, axis_name)
        metrics["first_ratio_off"] = off
    return metrics


def explained_variance(
    returns: Array, values: Array, mask: Array, *, axis_name: str | None = None
) -> Array:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for a
    constant.
    """
    spread = masked.var(returns, mask, axis_name=axis_name)
    left = masked.var(returns - values, mask, axis_name=axis_name)
    return jnp.where(spread > 0, 1.0 - left / jnp.where(spread > 0, spread, 1.0), 0.0)
