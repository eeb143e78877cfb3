"""The whole algorithm, top to bottom.

    1. rollout      sample a response to every prompt with the current policy; score it with the reference
    2. reward       one score a response (or several), shaped, and which rows are valid and worth learning from
    3. KL control   the penalty on leaving the reference joins the reward, token by token (or stands in the loss)
    4. advantages   from rewards, and from values, a group, or a greedy response
    5. update       epochs x minibatches of the policy and value loss, clipped gradients, Adam (or one natural-gradient step)
    6. control      the KL coefficient moves towards its target

`make_train_step` closes over the parts; what it returns is a pure function
`train_step(state, prompts) -> (state, metrics)` and compiles into ONE XLA program
(`parallel.compile_step`). Reward, KL, advantages, losses, aggregation and update are
arguments (`types.Parts`): swap one and nothing else changes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import kl as kls
from jaxppo import masked, policy, sampling, types
from jaxppo.config import Config
from jaxppo.models import lora
from jaxppo.models.nlpo import lag
from jaxppo.optimizers import make_optimizer
from jaxppo.rewards import shaping
from jaxppo.rollout import only_finite, reference_params, rollout
from jaxppo.types import Batch, Model, Params, Parts, Prompts, Rollout, TrainState
from jaxppo.update import make_update

TrainStep = Callable[[TrainState, Prompts], tuple[TrainState, dict]]


def make_train_step(
    model: Model,
    parts: Parts,
    config: Config,
    *,
    axis_name: str | None = None,
    stop_axis: str | None = None,
) -> TrainStep:
    """The train step of `parts` for `model`: `train_step(state, prompts) -> (state,
    metrics)`, pure, one XLA program.

    prompts: one `types.Prompts` of `config.rows` rows (of this device's share, under
    pmap with `axis_name`). stop_axis: under vmap, the axis of the runs that decode
    together (`sweep.py`): the loop goes on until all have ended. metrics: float32
    scalars, global over `axis_name`; `kl` is in nats a response, `entropy` in nats a
    token.
    """
    update = (parts.update or make_update)(model, parts, config, axis_name=axis_name)
    has_critic, full_kl = parts.value_loss is not None, parts.kl is kls.full
    in_reward = config.kl_place == "reward"

    def train_step(state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        types.check(prompts, prompt_length=config.prompt_length)
        # The run's key and the step's number make every key below: no two steps share
        # noise, and a resumed run replays it.
        sample_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        frozen = {**state.frozen, "base": policy.cast(state.frozen["base"], model.dtype)}
        statistics = lag(state, config)

        # 1. rollout
        noise = sampling.row_uniforms(sample_key, prompts.index, config.response_length)
        roll = partial(
            rollout,
            model,
            state.params,
            frozen,
            prompts,
            noise,
            length=config.response_length,
            sample=config,
            eos=config.eos,
            pad=config.pad,
            stop_axis=stop_axis,
        )
        with jax.named_scope("rollout"):  # names that a profile shows
            rolled = roll(
                with_values=has_critic,
                lagged=statistics["lagged"] if config.mask_top_p < 1 else None,
            )

        # 2. reward
        with jax.named_scope("reward"):
            earned, statistics = score_rollout(
                parts, config, frozen["reward"], rolled, roll, statistics, axis_name
            )
        rolled, shaped, valid, learn = earned.rollout, earned.scores, earned.valid, earned.learn

        # 3. KL control
        kl_coef = state.controller["kl_coef"]
        kl = parts.kl
        if full_kl and in_reward:
            reference = reference_params(state.params, frozen)
            exact = policy.full_kl(
                model, lora.merge(frozen["base"], state.params), reference, rolled, config=config
            )
            kl = lambda *_: exact
        if not in_reward:
            kl = lambda logprobs, _: jnp.zeros_like(logprobs)
        rewards = parts.token_rewards(row_scores(shaped), rolled, kl_coef=kl_coef, kl=kl)
        if config.whiten_rewards:
            rewards = masked.whiten(
                rewards, rolled.mask * valid[:, None], shift_mean=False, axis_name=axis_name
            )

        # 4. advantages
        with jax.named_scope("advantages"):
            advantages, returns, statistics = parts.advantage(
                rewards, shaped, rolled, valid=learn, statistics=statistics, axis_name=axis_name
            )
        mask = rolled.mask * learn[:, None].astype(rolled.mask.dtype)
        batch = Batch(rolled, mask, rolled.logprobs, advantages, returns)

        # 5. update
        with jax.named_scope("update"):
            new, metrics = update(
                state.replace(frozen=frozen, statistics=statistics), batch, update_key
            )

        # 6. control
        updates = metrics.pop("updates", 1.0)
        kl, rows, controller = control(state, rolled, valid, metrics, parts, config, axis_name)
        metrics |= earned.metrics | {
            "kl": kl,
            "kl_coef": kl_coef,
            "advantage_std": jnp.sqrt(masked.var(advantages, mask, axis_name=axis_name)),
            "explained_variance": explained_variance(
                returns, rolled.values, mask, axis_name=axis_name
            ),
        }
        counters = {
            "skipped_updates": state.counters["skipped_updates"]
            + metrics["skipped"].astype(jnp.int32),
            "invalid_rows": state.counters["invalid_rows"]
            + metrics["invalid_rows"].astype(jnp.int32),
            "barren_steps": jnp.where(
                no_finite_update(metrics, updates), state.counters["barren_steps"] + 1, 0
            ),
        }
        metrics["barren_steps"] = counters["barren_steps"].astype(jnp.float32)
        return new.replace(
            step=state.step + 1,
            frozen=state.frozen,
            controller=controller,
            statistics=statistics,
            cursor=state.cursor + rows.astype(jnp.int32) * config.oversample // config.group_size,
            counters=counters,
        ), metrics

    return train_step


def no_finite_update(metrics: dict, updates: Array | float) -> Array:
    """Whether none of a step's `updates` was finite (those left out on purpose
    aside).
    """
    return (metrics["skipped"] > 0) & (
        metrics["skipped"] + metrics["stopped"] + metrics["empty"] >= updates
    )


class Scored(NamedTuple):
    """Rollouts with what they earned; only those that are kept."""

    rollout: Rollout
    scores: Array  # [B] or [B R], shaped; 0 where invalid
    valid: Array  # [B]: the reward could be had
    learn: Array  # [B]: and the row is worth learning from
    metrics: dict  # of all rollouts, before any are left out


def score_rollout(
    parts: Parts,
    config: Config,
    reward_params: Params,
    rolled: Rollout,
    roll: Callable,
    statistics: dict,
    axis_name: str | None,
) -> tuple[Scored, dict]:
    """Scores, shaped; a greedy baseline if the parts ask for one (`roll` makes it); and
    which groups to keep.
    """
    rolled, finite = only_finite(rolled)
    scores, valid = parts.reward(reward_params, rolled)
    valid = valid & finite & jnp.isfinite(row_scores(scores))
    scores = jnp.where(valid if scores.ndim == 1 else valid[:, None], scores, 0.0)
    measured = valid & (rolled.mask.sum(1) > 0)
    mean = lambda x, rows=measured: masked.mean(x, rows, axis_name=axis_name)
    metrics = {
        "reward": mean(row_scores(scores)),
        "length": mean(rolled.mask.sum(1)),
        "finished": mean(rolled.finished.astype(jnp.float32)),
    }
    for task in range(config.num_tasks) if config.num_tasks > 1 else ():
        metrics[f"reward_{task}"] = mean(
            row_scores(scores), measured & (rolled.extra["task"] == task)
        )
    shape, statistics = shaping.shaper(
        scores, rolled, valid=valid, statistics=statistics, config=config, axis_name=axis_name
    )
    shaped = shape(scores, rolled, valid)
    # on the scale of the sampled scores, and no part of their statistics
    if parts.greedy:
        greedy = roll(with_values=False, greedy=True)
        baseline, good = parts.reward(reward_params, greedy)
        valid = valid & good & jnp.isfinite(row_scores(baseline))
        rolled = rolled.replace(
            extra={**rolled.extra, "greedy_scores": row_scores(shape(baseline, greedy, valid))}
        )
    metrics["invalid_rows"] = masked.total(~valid, jnp.ones_like(valid), axis_name=axis_name)
    if not config.filter_groups:
        return Scored(rolled, shaped, valid, valid, metrics), statistics
    useful = shaping.informative(row_scores(scores), valid, group_size=config.group_size)
    metrics["informative"] = masked.mean(useful, jnp.ones_like(useful), axis_name=axis_name)
    if (
        config.oversample == 1
        # in their order, so that minibatches hold the same rows on any number of devices
    ):
        return Scored(rolled, shaped, valid, useful, metrics), statistics
    keep = shaping.first_groups(
        useful, group_size=config.group_size, rows=useful.shape[0] // config.oversample
    )
    rolled, shaped, valid, useful = shaping.take_rows((rolled, shaped, valid, useful), keep)
    return Scored(rolled, shaped, valid, useful, metrics), statistics


def control(
    state: TrainState,
    rolled: Rollout,
    valid: Array,
    metrics: dict,
    parts: Parts,
    config: Config,
    axis_name: str | None,
) -> tuple[Array, Array, dict]:
    """(nats a response to the reference, number of rows, the coefficients for the next
    step), over all devices.
    """
    measurable = valid & (rolled.mask.sum(1) > 0)
    row_kl = ((rolled.raw_logprobs - rolled.ref_logprobs) * rolled.mask).sum(1)
    kl = masked.mean(row_kl, measurable, axis_name=axis_name)
    rows = masked.total(jnp.ones_like(row_kl), jnp.ones_like(valid), axis_name=axis_name)
    measured = masked.total(measurable, measurable, axis_name=axis_name) > 0
    coef = state.controller["kl_coef"]
    return (
        kl,
        rows,
        {
            "kl_coef": jnp.where(measured, _adapt_kl_coef(coef, kl, rows, config), coef),
            "beta": _adapt_beta(state.controller["beta"], metrics["last_approx_kl"], parts, config),
        },
    )


def repeat(train_step: TrainStep) -> TrainStep:
    """K steps in one dispatch: prompts and metrics get a leading dimension K. Same
    result as K calls.
    """

    def steps(state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        # closed over, not carried: a loop may copy what it carries
        frozen = state.frozen

        def one(live, prompts):
            new, metrics = train_step(live.replace(frozen=frozen), prompts)
            return new.replace(frozen=None), metrics

        live, metrics = jax.lax.scan(one, state.replace(frozen=None), prompts)
        return live.replace(frozen=frozen), metrics

    return steps


def init_state(config: Config, params: Params, frozen: Params, key: Array) -> TrainState:
    """The state before the first step. `params` is what is trained; `frozen` has base,
    reference (or None), reward.
    """
    # one array each: a buffer may be donated only once
    zero = lambda: jnp.zeros((), jnp.int32)
    statistics = shaping.init_statistics()
    if config.mask_top_p < 1:
        statistics["lagged"] = jax.tree.map(jnp.copy, dict(params))
    return TrainState(
        step=zero(),
        key=key,
        params=params,
        frozen=frozen,
        opt_state=make_optimizer(config).init(params),
        controller={
            "kl_coef": jnp.asarray(config.kl_coef, jnp.float32),
            "beta": jnp.asarray(config.beta, jnp.float32),
        },
        statistics=statistics,
        cursor=zero(),
        counters={"skipped_updates": zero(), "invalid_rows": zero(), "barren_steps": zero()},
    )


def explained_variance(
    returns: Array, values: Array, mask: Array, *, axis_name: str | None = None
) -> Array:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for a
    constant one.
    """
    spread = masked.var(returns, mask, axis_name=axis_name)
    left = masked.var(returns - values, mask, axis_name=axis_name)
    return jnp.where(spread > 0, 1.0 - left / jnp.where(spread > 0, spread, 1.0), 0.0)


def row_scores(scores: Array) -> Array:
    """One number for each response: the sum of its rewards."""
    return scores if scores.ndim == 1 else scores.sum(-1)


def _adapt_kl_coef(coef, kl, rows, config: Config):
    if not config.kl_adaptive:
        return coef
    if config.kl_rule == "ppo":
        new = kls.adapt_ppo(coef, kl, target=config.kl_target)
    else:
        new = kls.adapt(coef, kl, target=config.kl_target, horizon=config.kl_horizon, num_rows=rows)
    new = jnp.maximum(new, config.kl_coef_min).astype(jnp.float32)
    # one NaN would stay in the coefficient for good
    return jnp.where(jnp.isfinite(kl), new, coef)


def _adapt_beta(beta, kl, parts: Parts, config: Config):
    """PPO's rule for the pull to the old policy, of which `kl` tells how far the step
    has gone.
    """
    if not (parts.penalty and config.beta_target > 0):
        return beta
    measured = jnp.isfinite(kl) & (kl > 0)  # a policy that has moved is never at 0
    return jnp.where(measured, kls.adapt_ppo(beta, kl, target=config.beta_target), beta)
