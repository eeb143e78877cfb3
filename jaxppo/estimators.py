"""Advantage estimators as parts of the step: the formulas of `advantages`, fed from a
rollout.

Each maker takes the settings and gives an `AdvantageFn`: (rewards [B T], scores [B] or
[B R], rollout, *, valid, statistics, axis_name) -> (advantages, returns, statistics).
`rewards` already hold the score, on the last token, and the KL penalty if it is in the
reward; estimators on whole responses use their sum, so that the penalty reaches them.
Returns are the critic's targets.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo import advantages, masked
from jaxppo.config import Config
from jaxppo.types import AdvantageFn

Estimate = tuple[Float[Array, "B T"], Float[Array, "B T"], dict]


def gae(config: Config) -> AdvantageFn:
    """GAE on the critic's values (https://arxiv.org/abs/1506.02438), whitened over the
    global batch unless the settings say no.

    critic_lam gives the critic's targets a λ of their own, lam_alpha makes the policy's
    depend on the length (VC-PPO and VAPO, https://arxiv.org/abs/2503.01491,
    https://arxiv.org/abs/2504.05118).
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        lam = (
            advantages.length_adaptive_lam(mask, alpha=config.lam_alpha)
            if config.lam_alpha
            else config.lam
        )
        adv, returns = advantages.gae(rewards, rollout.values, mask, gamma=config.gamma, lam=lam)
        if config.critic_lam is not None:
            returns = advantages.gae(
                rewards, rollout.values, mask, gamma=config.gamma, lam=config.critic_lam
            )[1]
        return _whitened(adv, mask, config, axis_name, default=True), returns, statistics

    return advantage


def monte_carlo(config: Config) -> AdvantageFn:
    """The discounted rewards that follow a token, without a baseline (Williams
    1992).
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        returns = advantages.returns_to_go(rewards, mask, gamma=config.gamma)
        return _whitened(returns, mask, config, axis_name), returns, statistics

    return advantage


def reinforce_plus_plus(config: Config) -> AdvantageFn:
    """Returns-to-go whitened over the tokens of the batch, ddof 1
    (https://arxiv.org/abs/2501.03262).
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        returns = advantages.returns_to_go(rewards, mask, gamma=config.gamma)
        return (
            advantages.reinforce_plus_plus(rewards, mask, gamma=config.gamma, axis_name=axis_name),
            returns,
            statistics,
        )

    return advantage


def remax(config: Config) -> AdvantageFn:
    """Returns-to-go less the score of the greedy response
    (https://arxiv.org/abs/2310.10505). Needs `Parts.greedy`.
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        adv = advantages.remax(rewards, rollout.extra["greedy_scores"], mask)
        returns = advantages.returns_to_go(rewards, mask, gamma=config.gamma)
        return _whitened(adv, mask, config, axis_name), returns, statistics

    return advantage


def on_rows(
    estimate: Callable[..., Float[Array, "B"]], *, whiten: bool = False
) -> Callable[[Config], AdvantageFn]:
    """An estimator on whole responses: estimate(total [B], mask, valid=, config=,
    axis_name=) -> [B], put on every token.
    """

    def make(config: Config) -> AdvantageFn:
        def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
            mask = _mask(rollout, valid)
            row = estimate(
                masked.total(rewards, mask, axis=1),
                mask,
                valid=valid,
                config=config,
                axis_name=axis_name,
            )
            adv = masked.keep(jnp.broadcast_to(row[:, None], mask.shape), mask)
            adv = _whitened(adv, mask, config, axis_name, default=whiten)
            return adv, advantages.returns_to_go(rewards, mask, gamma=config.gamma), statistics

        return advantage

    return make


def gdpo(config: Config) -> AdvantageFn:
    """Several rewards, each normalised in its group, then summed
    (https://arxiv.org/abs/2601.05242). A KL penalty in the reward does not reach it:
    use kl_place loss.
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        columns = scores[:, None] if scores.ndim == 1 else scores
        row = advantages.gdpo(
            columns, group_size=config.group_size, valid=valid, axis_name=axis_name
        )
        adv = masked.keep(jnp.broadcast_to(row[:, None], mask.shape), mask)
        return adv, advantages.returns_to_go(rewards, mask, gamma=config.gamma), statistics

    return advantage


def moving_average(config: Config) -> AdvantageFn:
    """The response's return less an exponential average of those of earlier steps
    (Williams 1992): b ← d b + (1 − d) mean R, over its weight, so that it starts
    unbiased. The batch itself is not in it.
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        rows = valid & (mask.sum(1) > 0)
        total = masked.total(rewards, mask, axis=1)
        old = statistics["baseline"]
        known = old["weight"] > 0
        level = jnp.where(known, old["mean"] / jnp.where(known, old["weight"], 1.0), 0.0)
        d = config.baseline_decay
        seen = masked.mean(total, rows, axis_name=axis_name)
        some = masked.total(rows, rows, axis_name=axis_name) > 0
        new = {"mean": d * old["mean"] + (1 - d) * seen, "weight": d * old["weight"] + (1 - d)}
        new = jax.tree.map(lambda a, b: jnp.where(some, a, b), new, old)
        adv = masked.keep(jnp.broadcast_to((total - level)[:, None], mask.shape), mask)
        returns = advantages.returns_to_go(rewards, mask, gamma=config.gamma)
        return _whitened(adv, mask, config, axis_name), returns, {**statistics, "baseline": new}

    return advantage


def group(total, mask, *, valid, config, axis_name):
    return advantages.group(total, group_size=config.group_size, valid=valid)


def group_mean(total, mask, *, valid, config, axis_name):
    return advantages.group(total, group_size=config.group_size, normalise_std=False, valid=valid)


def rloo(total, mask, *, valid, config, axis_name):
    return advantages.rloo(total, group_size=config.group_size, valid=valid)


def opo(total, mask, *, valid, config, axis_name):
    return advantages.opo(total, mask.sum(1), group_size=config.group_size, valid=valid)


def gpg(total, mask, *, valid, config, axis_name):
    return advantages.gpg(total, group_size=config.group_size, valid=valid, axis_name=axis_name)


def batch_mean(total, mask, *, valid, config, axis_name):
    """Less the mean over the batch."""
    return total - masked.mean(total, valid, axis_name=axis_name)


def _mask(rollout, valid):
    return rollout.mask * valid[:, None].astype(rollout.mask.dtype)


def _whitened(adv, mask, config: Config, axis_name, *, default: bool = False):
    if not (default if config.whiten_advantages is None else config.whiten_advantages):
        return adv
    return masked.whiten(
        adv, mask, ddof=config.whiten_ddof, shift_mean=config.whiten_shift, axis_name=axis_name
    )
