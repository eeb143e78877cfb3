"""Advantage estimators as parts of the step: the formulas of `advantages`, applied to a
rollout.

Each estimator takes the settings and returns an `AdvantageFn`: (rewards [B T], scores
[B] or [B R], rollout, *, valid, statistics, axis_name) -> (advantages, returns,
statistics). `rewards` include the score, on the last token, and the KL penalty if it is
in the reward; estimators on whole responses (`on_rows`) use their sum, so that the
penalty reaches them. Returns are the critic's targets. `statistics` are kept from step
to step; only `moving_average` changes them.
"""

import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxppo import advantages, masked
from jaxppo.config import Config
from jaxppo.types import AdvantageFn


def gae(config: Config) -> AdvantageFn:
    """GAE on the critic's values (https://arxiv.org/abs/1506.02438), whitened over the
    global batch by default.

    `critic_lam` gives the critic's targets another λ, `lam_alpha` makes the policy's λ
    depend on the length (VC-PPO, https://arxiv.org/abs/2503.01491, and VAPO,
    https://arxiv.org/abs/2504.05118).
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask, values, lam = _mask(rollout, valid), rollout.values, config.lam
        if config.lam_alpha:
            lam = advantages.length_adaptive_lam(mask, alpha=config.lam_alpha)
        adv, returns = advantages.gae(rewards, values, mask, gamma=_discount(mask, config), lam=lam)
        if config.critic_lam is not None:
            _, returns = advantages.gae(
                rewards, values, mask, gamma=_discount(mask, config), lam=config.critic_lam
            )
        return _whitened(adv, mask, config, axis_name, default=True), returns, statistics

    return advantage


def turn_gae(config: Config) -> AdvantageFn:
    """GAE with each turn of an episode as one action, discounted by `turn_gamma` alone
    (https://arxiv.org/abs/2512.17008), whitened as `gae` is.
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        estimate = partial(
            advantages.turn_gae, rewards, rollout.values, mask, gamma=config.turn_gamma
        )
        adv, returns = estimate(lam=config.lam)
        if config.critic_lam is not None:
            _, returns = estimate(lam=config.critic_lam)
        return _whitened(adv, mask, config, axis_name, default=True), returns, statistics

    return advantage


def monte_carlo(config: Config) -> AdvantageFn:
    """Discounted returns, without a baseline (Williams 1992)."""

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        returns = _returns(rewards, mask, config)
        return _whitened(returns, mask, config, axis_name), returns, statistics

    return advantage


def reinforce_plus_plus(config: Config) -> AdvantageFn:
    """Returns-to-go whitened over the tokens of the batch, ddof 1
    (https://arxiv.org/abs/2501.03262).
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        discount = _discount(mask, config)
        adv = advantages.reinforce_plus_plus(rewards, mask, gamma=discount, axis_name=axis_name)
        return adv, _returns(rewards, mask, config), statistics

    return advantage


def remax(config: Config) -> AdvantageFn:
    """Returns-to-go minus the score of the greedy response
    (https://arxiv.org/abs/2310.10505). Needs `Parts.greedy`.
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        adv = advantages.remax(rewards, rollout.extra["greedy_scores"], mask)
        returns = _returns(rewards, mask, config)
        return _whitened(adv, mask, config, axis_name), returns, statistics

    return advantage


def on_rows(
    formula: Callable[..., Float[Array, "B"]], *, whiten: bool = False
) -> Callable[[Config], AdvantageFn]:
    """An estimator on whole responses: formula(total [B], ...) -> [B], the same on
    every token of a row. `total` is the sum of a row's rewards.

    The formula is called with those of the keywords `group_size`, `valid` Bool[B],
    `lengths` [B] and `axis_name` that its signature names.
    """
    named = inspect.signature(formula).parameters

    def make(config: Config) -> AdvantageFn:
        def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
            mask = _mask(rollout, valid)
            inputs = {
                "group_size": config.group_size,
                "valid": valid,
                "lengths": mask.sum(1),
                "axis_name": axis_name,
            }
            chosen = {name: x for name, x in inputs.items() if name in named}
            row = formula(masked.total(rewards, mask, axis=1), **chosen)
            adv = _whitened(_on_tokens(row, mask), mask, config, axis_name, default=whiten)
            return adv, _returns(rewards, mask, config), statistics

        return advantage

    return make


def batch_mean(
    total: Float[Array, "B"], *, valid: Bool[Array, "B"], axis_name: str | None = None
) -> Float[Array, "B"]:
    """A row's total minus the mean of the batch: Rᵢ − mean R."""
    return total - masked.mean(total, valid, axis_name=axis_name)


def gdpo(config: Config) -> AdvantageFn:
    """Several rewards, each normalised in its group, then summed
    (https://arxiv.org/abs/2601.05242). It reads the scores, so a KL penalty in the
    reward does not reach it: use kl_place loss.
    """

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = _mask(rollout, valid)
        columns = scores[:, None] if scores.ndim == 1 else scores
        row = advantages.gdpo(
            columns, group_size=config.group_size, valid=valid, axis_name=axis_name
        )
        return _on_tokens(row, mask), _returns(rewards, mask, config), statistics

    return advantage


def moving_average(config: Config) -> AdvantageFn:
    """The response's return minus an exponential average of the returns of earlier
    steps (Williams 1992): b ← d b + (1 − d) mean R, divided by its weight, so that it
    is unbiased from the start. The batch itself is not in its own baseline.
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
        adv = _whitened(_on_tokens(total - level, mask), mask, config, axis_name)
        return adv, _returns(rewards, mask, config), {**statistics, "baseline": new}

    return advantage


def _returns(rewards, mask, config: Config) -> Float[Array, "B T"]:
    return advantages.returns_to_go(rewards, mask, gamma=_discount(mask, config))


def _mask(rollout, valid):
    return rollout.mask * valid[:, None].astype(rollout.mask.dtype)


def _discount(mask, config: Config):
    """The discount of the settings, a scalar if all tokens have the same."""
    if isinstance(config.turn_gamma, float | int) and config.turn_gamma == 1:
        return config.gamma
    return advantages.turn_discounts(mask, gamma=config.gamma, turn_gamma=config.turn_gamma)


def _on_tokens(row, mask):
    """A number a row [B] on every token of its row [B T], 0 at padding."""
    return masked.keep(jnp.broadcast_to(row[:, None], mask.shape), mask)


def _whitened(adv, mask, config: Config, axis_name, *, default: bool = False):
    if not (default if config.whiten_advantages is None else config.whiten_advantages):
        return adv
    return masked.whiten(
        adv, mask, ddof=config.whiten_ddof, shift_mean=config.whiten_shift, axis_name=axis_name
    )
