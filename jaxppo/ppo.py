"""The whole algorithm, top to bottom.

    1. rollout      sample a response to every prompt with the current policy; compute
                    the reference's log-probs of it (and the scorer's, if it differs)
    2. reward       score each response (one or several scores), shape scores, decide
                    which rows are valid and worth learning from
    3. KL penalty   subtract the KL to the reference from the reward of each token (or
                    leave it to the loss); add what a teacher thinks of it
    4. advantages   from rewards and values, a group, or a greedy response
    5. update       epochs x minibatches of policy and value loss, clipped gradients,
                    Adam (or one natural-gradient step)
    6. control      adapt the KL coefficient so that the KL nears its target

`make_train_step` closes over the parts and returns a pure function `train_step(state,
prompts) -> (state, metrics)` that compiles into ONE XLA program (`jaxppo.parallel`).
Reward, KL, advantages, losses, aggregation and update are arguments (`types.Parts`):
swap one, and nothing else changes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import distillation, masked, packing, policy, sampling, types
from jaxppo import kl as kls
from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.models import copies, lora, nlpo
from jaxppo.optimizers import make_optimizer
from jaxppo.rewards import shaping
from jaxppo.rewards.shaping import row_scores
from jaxppo.rollout import reference_params, replace_nonfinite, rescore, rollout
from jaxppo.types import Batch, Model, Params, Parts, Prompts, Rollout, TrainState
from jaxppo.update import make_update, ratio_off

TrainStep = Callable[[TrainState, Prompts], tuple[TrainState, dict]]


def make_train_step(
    model: Model,
    parts: Parts,
    config: Config,
    *,
    axis_name: str | None = None,
    stop_axis: str | None = None,
) -> TrainStep:
    """Make the train step: `train_step(state, prompts) -> (state, metrics)`, pure, one
    XLA program.

    Its `prompts` are `config.rows` rows (under pmap, this device's share of them). Its
    metrics are float32 scalars, global over `axis_name`; `kl` is in nats a response,
    `entropy` in nats a token.

    stop_axis: under vmap over runs, the axis whose runs decode until all have ended.
    """
    if config.decode_dtype != "same" and not model.packs:
        raise UserError(f"--decode-dtype {config.decode_dtype} needs a transformer: leave it out")
    model, parts = nlpo.with_mask(model, config), types.checked(parts)
    axes: dict = {"axis_name": axis_name} | ({"stop_axis": stop_axis} if stop_axis else {})
    update = (parts.update or make_update)(model, parts, config, **axes)

    def train_step(state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        types.check_prompts(prompts, prompt_length=config.prompt_length)
        # All keys come from the run's key and the step's number: no two steps share
        # noise, and a resumed run repeats it.
        sample_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        statistics = copies.follow(state, state.statistics, config, copies.BEFORE)
        base = nlpo.with_lagged(policy.cast(state.frozen["base"], model.dtype), statistics)
        frozen = copies.with_reference({**state.frozen, "base": base}, statistics)

        # 1. rollout
        noise = sampling.row_uniforms(sample_key, prompts.index, config.response_length)
        generate = partial(
            rollout,
            model,
            state.params,
            frozen,
            prompts,
            noise,
            length=config.response_length,
            sample=config,
            group_size=config.group_size,
            stop_axis=stop_axis,
            environment=parts.environment,
            world_keys=sampling.world_keys(sample_key, prompts.index),
            decode_dtype=config.decode_dtype,
        )
        critic = parts.value_loss is not None
        with jax.named_scope("rollout"):  # the names appear in profiles
            rolled = generate(with_values=critic)
        if config.old_logprobs == "scorer":
            own, options = (model, state.params, frozen), {"config": config, "axes": (stop_axis,)}
            with jax.named_scope("rescore"):
                rolled = rescore(*own, rolled, with_values=critic, **options)

        # 2. reward
        with jax.named_scope("reward"):
            scored, statistics = score_rollout(
                parts, config, frozen["reward"], rolled, generate, statistics, axis_name
            )
        rolled, valid, learn = scored.rollout, scored.valid, scored.learn

        # 3. KL penalty
        kl_coef = state.controller["kl_coef"]
        rewards = parts.token_rewards(
            row_scores(scored.scores),
            rolled,
            kl_coef=kl_coef,
            kl=reward_kl(model, parts, config, state.params, frozen, rolled, stop_axis),
        )
        if parts.teacher is not None:
            with jax.named_scope("teacher"):
                rolled, gains = distillation.ask(
                    parts.teacher,
                    distillation.teacher_params(state.params, frozen),
                    rolled,
                    config=config,
                    with_states=parts.divergence is not None,
                    axes=(stop_axis,),
                )
            scored.metrics["teacher_kl"] = response_mean(-gains, rolled, valid, axis_name)
            if parts.divergence is None:
                rewards = rewards + config.distil_coef * gains
        if config.whiten_rewards:
            mask = rolled.mask * valid[:, None]
            rewards = masked.whiten(rewards, mask, shift_mean=False, axis_name=axis_name)

        # 4. advantages
        with jax.named_scope("advantages"):
            advantages, returns, statistics = parts.advantage(
                rewards,
                scored.scores,
                rolled,
                valid=learn,
                statistics=statistics,
                axis_name=axis_name,
            )
        mask = rolled.mask * learn[:, None].astype(rolled.mask.dtype)
        scores = row_scores(scored.scores)
        old = rolled.logprobs if rolled.old_logprobs is None else rolled.old_logprobs
        batch = Batch(rolled, mask, old, advantages, returns, scores=scores)

        # 5. update
        with jax.named_scope("update"):
            new, metrics = update(
                state.replace(frozen=frozen, statistics=statistics), batch, update_key
            )

        if config.old_logprobs == "scorer":  # how far it is from the sampler
            metrics["first_ratio_off"] = ratio_off(old, rolled.logprobs, rolled.mask, axis_name)

        # 6. control
        updates = metrics.pop("updates", 1.0)
        kl, rows, controller = control(state, rolled, valid, metrics, parts, config, axis_name)
        metrics |= scored.metrics | {
            "kl": kl,
            "kl_coef": kl_coef,
            "advantage_std": jnp.sqrt(masked.var(advantages, mask, axis_name=axis_name)),
            "explained_variance": explained_variance(
                returns, rolled.values, mask, axis_name=axis_name
            ),
        }
        counters = count_failures(state, metrics, updates)
        metrics["barren_steps"] = counters["barren_steps"].astype(jnp.float32)
        prompts_used = rows.astype(jnp.int32) * config.oversample // config.group_size
        new = new.replace(
            step=state.step + 1,
            frozen=state.frozen,
            controller=controller,
            statistics=copies.follow(new, statistics, config, copies.AFTER),
            cursor=state.cursor + prompts_used,
            counters=counters,
        )
        return new, metrics

    return train_step


class Scored(NamedTuple):
    """The rollouts kept for the update, with their scores."""

    rollout: Rollout
    scores: Array  # [B] or [B R], shaped; 0 where invalid
    valid: Array  # Bool[B]: the reward could be computed
    learn: Array  # Bool[B]: valid, and worth learning from
    metrics: dict  # of all rollouts, before any are dropped


def score_rollout(
    parts: Parts,
    config: Config,
    reward_params: Params,
    rolled: Rollout,
    generate: Callable,
    statistics: dict,
    axis_name: str | None,
) -> tuple[Scored, dict]:
    """Score and shape the rollout, score a greedy baseline if the parts need one
    (`generate` makes it), and choose the groups to keep: (scored, statistics).
    """
    rolled, finite = replace_nonfinite(rolled)
    raw, valid = parts.reward(reward_params, rolled)
    valid = valid & finite & jnp.isfinite(row_scores(raw))
    raw = jnp.where(valid if raw.ndim == 1 else valid[:, None], raw, 0.0)
    if rolled.rewards is not None:
        rolled = rolled.replace(rewards=jnp.where(valid[:, None], rolled.rewards, 0.0))
    scores = shaping.weight_columns(raw, parts.score_weights)
    metrics = score_metrics(raw, scores, rolled, valid, parts, config, axis_name)
    if config.log_samples:
        metrics["samples"] = first_samples(raw, rolled, config)
    shape, statistics = shaping.make_shaper(
        scores,
        rolled,
        valid=valid,
        statistics=statistics,
        config=config,
        axis_name=axis_name,
        longest=acting_slots(parts, config),
    )
    shaped = shape(scores, rolled, valid)
    if parts.greedy:  # shaped with the statistics of sampled scores, not part of them
        greedy = generate(with_values=False, greedy=True)
        baseline, good = parts.reward(reward_params, greedy)
        valid = valid & good & jnp.isfinite(row_scores(baseline))
        weighted = shaping.weight_columns(baseline, parts.score_weights)
        baseline = row_scores(shape(weighted, greedy, valid))
        rolled = rolled.replace(extra={**rolled.extra, "greedy_scores": baseline})
    lost = jnp.stack([~valid, ~finite])
    lost = masked.total(lost, jnp.ones_like(lost), axis=1, axis_name=axis_name)
    metrics["invalid_rows"], metrics["nonfinite_rows"] = lost  # the second are among the first
    if not config.filter_groups:
        return Scored(rolled, shaped, valid, valid, metrics), statistics
    useful = shaping.informative(row_scores(scores), valid, group_size=config.group_size)
    # keep all rows in order, so minibatches do not depend on devices
    if config.oversample == 1:
        return Scored(rolled, shaped, valid, useful, metrics), statistics
    kept = useful.shape[0] // config.oversample
    keep = shaping.first_groups(useful, group_size=config.group_size, rows=kept)
    rolled, shaped, valid, useful = shaping.take_rows((rolled, shaped, valid, useful), keep)
    return Scored(rolled, shaped, valid, useful, metrics), statistics


def acting_slots(parts: Parts, config: Config) -> int:
    """The most tokens that the policy may write to a prompt."""
    world = parts.environment
    return config.response_length if world is None else world.max_turns * world.turn_length


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
    share of finished rows; and how much the rewards differ.
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


def reward_kl(
    model: Model,
    parts: Parts,
    config: Config,
    params: Params,
    frozen: Params,
    rolled: Rollout,
    stop_axis: str | None,
) -> Callable[[Array, Array], Array]:
    """The function (logprobs, ref_logprobs) -> KL a token for the reward; zeros if the
    KL is in the loss. A full KL is computed beforehand and ignores its arguments.
    """
    if config.kl_place != "reward":
        return lambda logprobs, _: jnp.zeros_like(logprobs)
    if not parts.full_kl:
        return parts.kl
    whole, reference = lora.merge(frozen["base"], params), reference_params(params, frozen)
    total = packing.make_sum(
        model, config, rolled, rolled.mask, group_size=config.group_size, axes=(stop_axis,)
    )
    exact = total(
        lambda part: policy.full_kl(
            model, whole, reference, rolled, config=config, divergence=parts.kl, part=part
        )
    )
    return lambda *_: exact


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
        "kl_coef": jnp.where(measured, _adapt_kl_coef(coef, kl, rows, config), coef),
        "beta": _adapt_beta(state.controller["beta"], metrics["last_approx_kl"], parts, config),
    }
    return kl, rows, controller


def response_mean(x: Array, rolled: Rollout, valid: Array, axis_name: str | None) -> Array:
    """The sum of x [B T] over a response, as a mean over valid responses."""
    measurable = valid & (rolled.mask.sum(1) > 0)
    return masked.mean((x * rolled.mask).sum(1), measurable, axis_name=axis_name)


def count_failures(state: TrainState, metrics: dict, updates: Array | float) -> dict:
    """The counters after this step; `barren_steps` counts steps in a row without a
    finite update.
    """
    old = state.counters
    failed = no_finite_update(metrics, updates)
    return {
        "skipped_updates": old["skipped_updates"] + metrics["skipped"].astype(jnp.int32),
        "invalid_rows": old["invalid_rows"] + metrics["invalid_rows"].astype(jnp.int32),
        "barren_steps": jnp.where(failed, old["barren_steps"] + 1, 0),
    }


def no_finite_update(metrics: dict, updates: Array | float) -> Array:
    """Whether an update was not finite and no other changed the parameters (the rest
    were stopped or empty).
    """
    left = metrics["skipped"] + metrics["stopped"] + metrics["empty"]
    return (metrics["skipped"] > 0) & (left >= updates)


def repeat(train_step: TrainStep) -> TrainStep:
    """Make K steps one dispatch: prompts and metrics get a leading dimension K. The
    result is that of K calls.
    """

    def steps(state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        frozen = state.frozen  # outside the scan's carry, which XLA may copy

        def one(live, prompts):
            new, metrics = train_step(live.replace(frozen=frozen), prompts)
            return new.replace(frozen=None), metrics

        live, metrics = jax.lax.scan(one, state.replace(frozen=None), prompts)
        return live.replace(frozen=frozen), metrics

    return steps


def init_state(config: Config, params: Params, frozen: Params, key: Array) -> TrainState:
    """The state before the first step. `params` are trained; `frozen` holds base,
    reference (or None) and reward.
    """
    zero = lambda: jnp.zeros((), jnp.int32)  # one array each: a buffer is donated once
    coefficient = lambda x: jnp.asarray(x, jnp.float32)
    return TrainState(
        step=zero(),
        key=key,
        params=params,
        frozen=frozen,
        opt_state=make_optimizer(config).init(params),
        controller={"kl_coef": coefficient(config.kl_coef), "beta": coefficient(config.beta)},
        statistics=shaping.init_statistics() | copies.init_copies(params, config),
        cursor=zero(),
        counters={"skipped_updates": zero(), "invalid_rows": zero(), "barren_steps": zero()},
    )


def explained_variance(
    returns: Array, values: Array, mask: Array, *, axis_name: str | None = None
) -> Array:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for a
    constant.
    """
    spread = masked.var(returns, mask, axis_name=axis_name)
    left = masked.var(returns - values, mask, axis_name=axis_name)
    return jnp.where(spread > 0, 1.0 - left / jnp.where(spread > 0, spread, 1.0), 0.0)


def _adapt_kl_coef(coef, kl, rows, config: Config):
    if not config.kl_adaptive:
        return coef
    if config.kl_rule == "ppo":
        new = kls.adapt_ppo(coef, kl, target=config.kl_target)
    else:
        new = kls.adapt(coef, kl, target=config.kl_target, horizon=config.kl_horizon, num_rows=rows)
    new = jnp.maximum(new, config.kl_coef_min).astype(jnp.float32)
    return jnp.where(jnp.isfinite(kl), new, coef)  # a NaN would stay for good


def _adapt_beta(beta, kl, parts: Parts, config: Config):
    """PPO's rule for the weight of the pull to the old policy; `kl` is in nats a
    token.
    """
    if not (parts.penalty and config.beta_target > 0):
        return beta
    # 0: not measured, since an updated policy has KL > 0
    measured = jnp.isfinite(kl) & (kl > 0)
    return jnp.where(measured, kls.adapt_ppo(beta, kl, target=config.beta_target), beta)
