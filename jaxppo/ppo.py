"""The whole algorithm, top to bottom.

    1. rollout      sample a response to every prompt with the current policy; compute
                    the reference's log-probs of it (and the scorer's, with
                    --old-logprobs scorer)
    2. reward       score each response (one or several scores), shape scores, decide
                    which rows are valid and worth learning from
    3. KL penalty   subtract the KL to the reference from the reward of each token (or
                    leave it to the loss); with a teacher, add its reward
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
from jaxtyping import Array, Bool, Float

from jaxppo import distillation, masked, policy, types
from jaxppo.config import Config
from jaxppo.control import control, count_failures
from jaxppo.errors import UserError
from jaxppo.models import copies, nlpo
from jaxppo.optimizers import make_optimizer
from jaxppo.rewards import shaping
from jaxppo.rewards.shaping import row_scores
from jaxppo.rollout import replace_nonfinite, rescore, reward_kl, sample_responses
from jaxppo.step_metrics import batch_metrics, response_mean, score_metrics
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
        generate = partial(
            sample_responses,
            config,
            model,
            state.params,
            frozen,
            prompts,
            sample_key,
            group_size=config.group_size,
            stop_axis=stop_axis,
            environment=parts.environment,
            decode_dtype=config.decode_dtype,
        )
        critic = parts.value_loss is not None
        with jax.named_scope("rollout"):  # the names appear in profiles
            rolled = generate(with_values=critic)
        if config.old_logprobs == "scorer":
            own, options = (model, state.params, frozen), {"config": config, "axes": (stop_axis,)}
            rolled = rescore(*own, rolled, with_values=critic, **options)

        # 2. reward
        with jax.named_scope("reward"):
            scored, statistics = score_rollout(
                parts, config, frozen["reward"], rolled, generate, statistics, axis_name
            )

        # 3. KL penalty
        rolled, rewards, taught = reward_tokens(
            model, parts, config, state, frozen, scored, axis_name, stop_axis
        )

        # 4. advantages
        batch, statistics = estimate_advantages(
            parts, rolled, rewards, scored, statistics, axis_name
        )

        # 5. update
        before = state.replace(frozen=frozen, statistics=statistics)
        with jax.named_scope("update"):
            new, metrics = update(before, batch, update_key)

        # 6. control
        kl, rows, controller = control(
            state, rolled, scored.valid, metrics, parts, config, axis_name
        )
        metrics |= {"kl": kl, "kl_coef": state.controller["kl_coef"]}
        metrics |= scored.metrics | taught | batch_metrics(batch, axis_name)
        counters = count_failures(state, metrics, metrics.pop("updates", 1.0))
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
    scores: Float[Array, "B"] | Float[Array, "B R"]  # shaped; 0 where invalid
    valid: Bool[Array, "B"]  # the reward could be computed
    learn: Bool[Array, "B"]  # valid, and worth learning from
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
    world = parts.environment
    shape, statistics = shaping.make_shaper(
        scores,
        rolled,
        valid=valid,
        statistics=statistics,
        config=config,
        axis_name=axis_name,
        longest=None if world is None else world.max_turns * world.turn_length,
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
    scored = Scored(rolled, shaped, valid, valid, metrics)
    return keep_informative(scored, row_scores(scores), config), statistics


def keep_informative(scored: Scored, scores: Array, config: Config) -> Scored:
    """With `filter_groups`, learn only from groups whose scores [B], before shaping,
    differ; of more groups than needed (`oversample`), keep the first of these.
    """
    if not config.filter_groups:
        return scored
    useful = shaping.informative(scores, scored.valid, group_size=config.group_size)
    scored = scored._replace(learn=useful)
    if config.oversample == 1:  # all rows in order: minibatches do not depend on devices
        return scored
    rows = useful.shape[0] // config.oversample
    keep = shaping.first_groups(useful, group_size=config.group_size, rows=rows)
    return Scored(*jax.tree.map(lambda x: x[keep], scored[:-1]), metrics=scored.metrics)


def reward_tokens(
    model: Model,
    parts: Parts,
    config: Config,
    state: TrainState,
    frozen: Params,
    scored: Scored,
    axis_name: str | None,
    stop_axis: str | None,
) -> tuple[Rollout, Float[Array, "B T"], dict]:
    """(rollout, rewards of its tokens, metrics): the scores, less the KL to the
    reference, plus what a teacher thinks of each token. With `Parts.divergence` the
    teacher is for the loss: the rollout gets its hidden states.
    """
    rolled, valid, axes = scored.rollout, scored.valid, (stop_axis,)
    rewards = parts.token_rewards(
        row_scores(scored.scores),
        rolled,
        kl_coef=state.controller["kl_coef"],
        kl=reward_kl(model, parts, config, state.params, frozen, rolled, axes),
    )
    metrics = {}
    if parts.teacher is not None:
        for_loss = parts.divergence is not None
        with jax.named_scope("teacher"):
            rolled, gains = distillation.ask(
                parts.teacher,
                distillation.teacher_params(frozen),
                rolled,
                config=config,
                with_states=for_loss,
                axes=axes,
            )
        metrics["teacher_kl"] = response_mean(-gains, rolled, valid, axis_name)
        if not for_loss:
            rewards = rewards + config.distil_coef * gains
    if config.whiten_rewards:
        mask = rolled.mask * valid[:, None]
        rewards = masked.whiten(rewards, mask, shift_mean=False, axis_name=axis_name)
    return rolled, rewards, metrics


def estimate_advantages(
    parts: Parts,
    rolled: Rollout,
    rewards: Array,
    scored: Scored,
    statistics: dict,
    axis_name: str | None,
) -> tuple[Batch, dict]:
    """(input of the update, statistics): advantages and returns of the rows that are
    learned from.
    """
    with jax.named_scope("advantages"):
        advantages, returns, statistics = parts.advantage(
            rewards,
            scored.scores,
            rolled,
            valid=scored.learn,
            statistics=statistics,
            axis_name=axis_name,
        )
    mask = rolled.mask * scored.learn[:, None].astype(rolled.mask.dtype)
    scores = row_scores(scored.scores)
    old = rolled.logprobs if rolled.old_logprobs is None else rolled.old_logprobs
    return Batch(rolled, mask, old, advantages, returns, scores=scores), statistics


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
