"""The end of a step: adapt the coefficients of the next step to how far the policy has
moved, and count failures.
"""

import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import kl as kls
from jaxppo import masked
from jaxppo.config import Config
from jaxppo.step_metrics import response_mean
from jaxppo.types import Parts, Rollout, Scalar, TrainState


def control(
    state: TrainState,
    rolled: Rollout,
    valid: Array,
    metrics: dict,
    parts: Parts,
    config: Config,
    axis_name: str | None,
) -> tuple[Array, Array, dict]:
    """(mean KL to the reference in nats a response, number of rows, coefficients of the
    next step), over all devices.
    """
    measurable = valid & (rolled.mask.sum(1) > 0)
    kl = response_mean(rolled.raw_logprobs - rolled.ref_logprobs, rolled, valid, axis_name)
    rows = masked.total(jnp.ones(valid.shape), jnp.ones_like(valid), axis_name=axis_name)
    measured = masked.total(measurable, measurable, axis_name=axis_name) > 0
    coef = state.controller["kl_coef"]
    controller = {
        "kl_coef": jnp.where(measured, next_coef(coef, kl, rows, config), coef),
        "beta": next_beta(state.controller["beta"], metrics["last_approx_kl"], parts, config),
    }
    return kl, rows, controller


def next_coef(coef: Scalar, kl: Scalar, rows: Scalar, config: Config) -> Scalar:
    """The coefficient after a step of so many rows with this KL, in nats a response, by
    the rule of the settings.
    """
    if not config.kl_adaptive:
        return coef
    if config.kl_rule == "ppo":
        new = kls.adapt_ppo(coef, kl, target=config.kl_target)
    else:
        new = kls.adapt(coef, kl, target=config.kl_target, horizon=config.kl_horizon, num_rows=rows)
    new = jnp.maximum(new, config.kl_coef_min).astype(jnp.float32)
    return jnp.where(jnp.isfinite(kl), new, coef)  # a NaN would stay for good


def next_beta(beta: Scalar, kl: Scalar, parts: Parts, config: Config) -> Scalar:
    """PPO's rule for the weight of the pull to the old policy; `kl` is in nats a
    token.
    """
    if not (parts.penalty and config.beta_target > 0):
        return beta
    # 0: not measured, since an updated policy has KL > 0
    measured = jnp.isfinite(kl) & (kl > 0)
    return jnp.where(measured, kls.adapt_ppo(beta, kl, target=config.beta_target), beta)


def count_failures(state: TrainState, metrics: dict, updates: Array | float) -> dict:
    """The counters after this step of so many `updates`; `barren_steps` counts steps in
    a row in which one was not finite and no other changed the parameters (the rest were
    stopped or empty).
    """
    old = state.counters
    left = metrics["skipped"] + metrics["stopped"] + metrics["empty"]
    failed = (metrics["skipped"] > 0) & (left >= updates)
    return {
        "skipped_updates": old["skipped_updates"] + metrics["skipped"].astype(jnp.int32),
        "invalid_rows": old["invalid_rows"] + metrics["invalid_rows"].astype(jnp.int32),
        "barren_steps": jnp.where(failed, old["barren_steps"] + 1, 0),
    }
