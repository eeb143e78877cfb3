"""The whole algorithm, top to bottom.

    1. rollout      sample a response to every prompt with the current policy; score it with the reference
    2. reward       one score a response, and which rows are valid
    3. KL control   the penalty on leaving the reference joins the reward, token by token
    4. advantages   from rewards and values, whitened over the global batch
    5. update       epochs x minibatches of the policy and value loss, clipped gradients, Adam
    6. control      the KL coefficient moves towards its target

`make_train_step` closes over the parts; what it returns is a pure function `train_step(state, prompts) -> (state, metrics)` and
compiles into ONE XLA program (`parallel.compile_step`). Every arrow above is an argument in `types.Parts`: swap one and
nothing else changes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import kl as kls
from jaxppo import masked, policy, sampling, types
from jaxppo.config import Config
from jaxppo.rewards.shaping import penalise_missing_eos
from jaxppo.rollout import rollout
from jaxppo.types import Batch, Model, Params, Parts, Prompts, TrainState
from jaxppo.update import make_optimizer, make_update

TrainStep = Callable[[TrainState, Prompts], tuple[TrainState, dict]]


def make_train_step(model: Model, parts: Parts, config: Config, *, axis_name: str | None = None) -> TrainStep:
    """The train step of `parts` for `model`: `train_step(state, prompts) -> (state, metrics)`, pure, one XLA program.

    prompts: one `types.Prompts` of batch_size rows (of this device's share, under pmap with `axis_name`).
    metrics: float32 scalars, global over `axis_name`; `kl` is in nats a response, `entropy` in nats a token.
    """
    update = make_update(model, parts, config, axis_name=axis_name)
    has_critic = parts.value_loss is not None

    def train_step(state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        types.check(prompts, prompt_length=config.prompt_length)
        # The run's key and the step's number make every key below: no two steps share noise, and a resumed run replays it.
        sample_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        frozen = {**state.frozen, "base": policy.cast(state.frozen["base"], model.dtype)}

        # 1. rollout
        noise = sampling.row_uniforms(sample_key, prompts.index, config.response_length)
        rolled = rollout(
            model, state.params, frozen, prompts, noise, length=config.response_length, sample=config, eos=config.eos,
            pad=config.pad, with_values=has_critic,
        )  # fmt: skip

        # 2. reward
        scores, valid = parts.reward(frozen["reward"], rolled)
        valid = valid & jnp.isfinite(scores)
        scores = jnp.where(valid, scores, 0.0)
        shaped = penalise_missing_eos(scores, rolled, penalty=config.missing_eos_penalty)

        # 3. KL control
        kl_coef = state.controller["kl_coef"]
        rewards = parts.token_rewards(shaped, rolled, kl_coef=kl_coef, kl=parts.kl)

        # 4. advantages
        advantages, returns, statistics = parts.advantage(
            rewards, shaped, rolled, valid=valid, statistics=state.statistics, axis_name=axis_name
        )
        mask = rolled.mask * valid[:, None].astype(rolled.mask.dtype)
        batch = Batch(rolled, mask, rolled.logprobs, advantages, returns)

        # 5. update
        new, metrics = update(state.replace(frozen=frozen), batch, update_key)

        # 6. control
        row_valid = (valid & (mask.sum(1) > 0)).astype(jnp.float32)
        row_kl = ((rolled.raw_logprobs - rolled.ref_logprobs) * mask).sum(1)
        kl = masked.mean(row_kl, row_valid, axis_name=axis_name)
        rows = masked.total(jnp.ones_like(row_valid), jnp.ones_like(row_valid), axis_name=axis_name)
        measured = masked.total(row_valid, row_valid, axis_name=axis_name) > 0
        controller = {"kl_coef": jnp.where(measured, _controlled(kl_coef, kl, rows, config), kl_coef)}

        invalid = masked.total(1.0 - valid.astype(jnp.float32), jnp.ones_like(row_valid), axis_name=axis_name)
        metrics |= {
            "reward": masked.mean(scores, row_valid, axis_name=axis_name),
            "kl": kl,
            "kl_coef": kl_coef,
            "length": masked.mean(rolled.mask.sum(1), row_valid, axis_name=axis_name),
            "finished": masked.mean(rolled.finished.astype(jnp.float32), row_valid, axis_name=axis_name),
            "advantage_std": jnp.sqrt(masked.var(advantages, mask, axis_name=axis_name)),
            "explained_variance": explained_variance(returns, rolled.values, mask, axis_name=axis_name),
            "invalid_rows": invalid,
        }
        counters = {
            "skipped_updates": state.counters["skipped_updates"] + metrics["skipped"].astype(jnp.int32),
            "invalid_rows": state.counters["invalid_rows"] + invalid.astype(jnp.int32),
        }
        return new.replace(
            step=state.step + 1, frozen=state.frozen, controller=controller, statistics=statistics,
            cursor=state.cursor + rows.astype(jnp.int32) // config.group_size, counters=counters,
        ), metrics  # fmt: skip

    return train_step


def repeat(train_step: TrainStep) -> TrainStep:
    """K steps in one dispatch: prompts and metrics get a leading dimension K. Same result as K calls."""

    def steps(state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        frozen = state.frozen  # closed over, not carried: a loop may copy what it carries

        def one(live, prompts):
            new, metrics = train_step(live.replace(frozen=frozen), prompts)
            return new.replace(frozen=None), metrics

        live, metrics = jax.lax.scan(one, state.replace(frozen=None), prompts)
        return live.replace(frozen=frozen), metrics

    return steps


def init_state(config: Config, params: Params, frozen: Params, key: Array) -> TrainState:
    """The state before the first step. `params` is what is trained; `frozen` has base, reference (or None), reward."""
    zero = lambda: jnp.zeros((), jnp.int32)  # one array each: a buffer may be donated only once
    return TrainState(
        step=zero(), key=key, params=params, frozen=frozen, opt_state=make_optimizer(config).init(params),
        controller={"kl_coef": jnp.asarray(config.kl_coef, jnp.float32)}, statistics={}, cursor=zero(),
        counters={"skipped_updates": zero(), "invalid_rows": zero()},
    )  # fmt: skip


def explained_variance(returns: Array, values: Array, mask: Array, *, axis_name: str | None = None) -> Array:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    spread = masked.var(returns, mask, axis_name=axis_name)
    left = masked.var(returns - values, mask, axis_name=axis_name)
    return jnp.where(spread > 0, 1.0 - left / jnp.where(spread > 0, spread, 1.0), 0.0)


def _controlled(coef, kl, rows, config: Config):
    if not config.kl_adaptive:
        return coef
    new = kls.adapt(coef, kl, target=config.kl_target, horizon=config.kl_horizon, num_rows=rows)
    new = jnp.maximum(new, config.kl_coef_min).astype(jnp.float32)
    return jnp.where(jnp.isfinite(kl), new, coef)  # one NaN would stay in the coefficient for good
