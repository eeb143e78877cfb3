"""From a batch of rollouts to new parameters: loss assembly, gradients, Optax, epochs x
minibatches as two scans.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxppo import kl as kls
from jaxppo import masked, optimizers, policy, sampling
from jaxppo.config import Config
from jaxppo.losses.shared import log_ratio
from jaxppo.models import lora
from jaxppo.rollout import reference_params
from jaxppo.types import Batch, Model, Params, Parts, Scalar, TrainState

TOKENS = (
    # among sums over tokens: how many there were; no name for a diagnostic of a loss
    "__tokens"
)


class LossConstants(NamedTuple):
    """What the loss reads and the epochs do not change."""

    base: Params
    reference: Params | None = None  # whole parameters, for the full-vocabulary KL
    lagged: Params | None = None  # whole parameters of NLPO's older policy
    kl_coef: Scalar = 0.0  # of the KL in the loss
    beta: Scalar = 0.0  # of a policy loss that takes it from the controller


def loss_constants(state: TrainState, parts: Parts, config: Config) -> LossConstants:
    """The fixed part of a state's loss."""
    base = state.frozen["base"]
    full = config.kl_place == "loss" and parts.kl is kls.full
    return LossConstants(
        base,
        reference_params(state.params, state.frozen) if full else None,
        lora.merge(base, state.statistics["lagged"]) if config.mask_top_p < 1 else None,
        state.controller["kl_coef"],
        state.controller["beta"],
    )


def minibatch_rows(
    key: Array, units: int, minibatches: int, first_block: Int[Array, ""] | int = 0
) -> Int[Array, "M K"]:
    """Which units (rows, or whole groups) of this device each minibatch gets:
    [minibatches, units / minibatches].

    Units are dealt in blocks of `minibatches`: block b is permuted with fold_in(key,
    b), b counted over all devices, and gives one unit to each minibatch. So minibatches
    are the same on any number of devices and no row moves between them.
    """
    blocks = units // minibatches
    shuffle = lambda b: jax.random.permutation(
        jax.random.fold_in(key, first_block + b), minibatches
    )
    order = jax.vmap(shuffle)(jnp.arange(blocks)) + minibatches * jnp.arange(blocks)[:, None]
    return order.T


def make_loss(model: Model, parts: Parts, config: Config, axis_name: str | None) -> Callable:
    """loss(params, fixed, weights, rows, key) -> (loss, metrics):  Σ w (policy loss + β KL − c_H entropy) + c_V Σ w value loss.

    The weights [B T] of these rows carry the GLOBAL denominator of the minibatch that
    they belong to, so losses and gradients are summed over devices and microbatches,
    never averaged. Metrics are sums over tokens too, beside their number.
    """

    def loss_fn(
        params: Params, fixed: LossConstants, weights: Array, batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], dict]:
        mask = batch.mask
        whole = lora.merge(fixed.base, params)
        scores = policy.token_logprobs(
            model,
            whole,
            batch.rollout,
            config=config,
            with_values=parts.value_loss is not None,
            guide=fixed.lagged,
        )
        settings = {"beta": fixed.beta} if parts.penalty else {}
        per_token, diagnostics = parts.policy_loss(
            scores.logprobs, batch.old_logprobs, batch.advantages, mask, key=key, **settings
        )
        if parts.correction is not None:
            per_token = per_token * parts.correction(
                batch.old_logprobs, batch.rollout.logprobs, mask
            )
        diagnostics = {**diagnostics, "policy_loss": per_token}
        if config.kl_place == "loss":
            penalty = _kl_term(model, parts, config, whole, fixed, batch, scores)
            per_token = per_token + fixed.kl_coef * penalty
            diagnostics["kl_loss"] = penalty
        entropy = masked.keep(scores.entropy, mask)
        total = (weights * (per_token - config.entropy_coef * entropy)).sum()
        diagnostics["entropy"] = entropy
        if parts.value_loss is not None:
            value = masked.keep(
                parts.value_loss(scores.values, batch.rollout.values, batch.returns), mask
            )
            total = total + config.value_coef * (weights * value).sum()
            diagnostics["value_loss"] = value
        diagnostics, logprobs = jax.lax.stop_gradient(
            (diagnostics, scores.logprobs)
        )  # a maximum over devices has no derivative
        moved = log_ratio(logprobs, batch.old_logprobs, mask)
        diagnostics["approx_kl"] = jnp.expm1(moved) - moved
        if config.mask_top_p < 1 or sampling.has_keep_set(config):
            diagnostics["outside_fraction"] = (logprobs <= policy.FLOOR).astype(jnp.float32)
        metrics = {
            name: masked.total(x, mask, axis_name=axis_name) for name, x in diagnostics.items()
        }
        metrics[TOKENS] = masked.total(jnp.ones_like(mask), mask, axis_name=axis_name)
        metrics["ratio_off"] = ratio_off(logprobs, batch.old_logprobs, mask, axis_name)
        return total, metrics

    return loss_fn


def _kl_term(
    model, parts: Parts, config: Config, whole: Params, fixed: LossConstants, batch: Batch, scores
) -> Float[Array, "B T"]:
    """The KL to the reference as a term of the loss, [B T], 0 at padding."""
    mask, rolled = batch.mask, batch.rollout
    if parts.kl is kls.full:
        assert fixed.reference is not None
        value = masked.keep(
            policy.full_kl(model, whole, fixed.reference, rolled, config=config), mask
        )
    else:
        value = parts.kl(
            masked.keep(scores.raw_logprobs, mask), masked.keep(rolled.ref_logprobs, mask)
        )
    # With the ratio's gradient the term is that of the divergence itself, whichever
    # estimator stands beside it.
    return (
        value * jnp.exp(log_ratio(scores.logprobs, batch.old_logprobs, mask))
        if config.kl_importance
        else value
    )


def make_update(
    model: Model,
    parts: Parts,
    config: Config,
    *,
    axis_name: str | None = None,
    critic_alone: bool = False,
) -> Callable:
    """update(state, batch, key) -> (state, metrics): all epochs and minibatches. One
    non-finite minibatch changes nothing, nor does an empty one.

    Above `kl_stop` nats a token from the sampling policy the rest of the minibatches
    are not even computed. In the first `critic_warmup` steps, or always with
    `critic_alone`, only the critic's own parameters learn.
    """
    optimizer = optimizers.make_optimizer(config)
    grad_fn = jax.value_and_grad(make_loss(model, parts, config, axis_name), has_aux=True)
    accumulate = partial(accumulated, grad_fn, microbatches=config.microbatches)
    watched = config.kl_stop > 0

    def learn(live, rows, key, fixed, batch, alone: Bool[Array, ""] | None):
        params, opt_state = live
        mine = jax.tree.map(lambda x: x[rows], batch)
        weights = parts.aggregate(mine.mask, axis_name=axis_name)
        (loss, metrics), grads = accumulate(params, fixed, weights, mine, key)
        # sums, not means: the weights already divide by the global count
        if axis_name is not None:
            loss, grads = jax.lax.psum((loss, grads), axis_name)
        if (
            alone is not None
        ):  # before the optimizer, so that nothing of the others enters its moments
            grads = optimizers.only_critic(grads, alone)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        stop = metrics["approx_kl"] > config.kl_stop if watched else jnp.zeros((), bool)
        # With every row invalid or left out the gradient is 0, but Adam's moments would
        # move the parameters yet.
        empty = masked.total(mine.mask, mine.mask, axis_name=axis_name) == 0
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        if alone is not None:  # weight decay would move them yet
            updates = optimizers.only_critic(updates, alone)
        new = (optax.apply_updates(params, updates), new_opt_state)
        # A select, not a branch: XLA fuses it into Adam's own loops, where a `cond`
        # would copy the parameters.
        live = jax.tree.map(lambda n, o: jnp.where(good & ~stop & ~empty, n, o), new, live)
        number = lambda x: x.astype(jnp.float32)
        outcome = {"skipped": 1.0 - number(good), "stopped": number(stop), "empty": number(empty)}
        return live, metrics | {"loss": loss, "grad_norm": norm} | outcome

    def update(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict]:
        unit = config.group_size
        units = batch.mask.shape[0] // unit
        blocks = units // config.minibatches
        first_block = 0 if axis_name is None else jax.lax.axis_index(axis_name) * blocks
        alone = (
            jnp.ones((), bool)
            if critic_alone
            else state.step < config.critic_warmup
            if config.critic_warmup
            else None
        )
        step = partial(learn, fixed=loss_constants(state, parts, config), batch=batch, alone=alone)

        def minibatch(carry, rows_and_key):
            if not watched:
                return step(carry, *rows_and_key)
            live, stopped = carry
            shapes = jax.eval_shape(step, live, *rows_and_key)[1]
            nothing = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()} | {
                "stopped": jnp.ones(())
            }
            live, metrics = jax.lax.cond(
                stopped,
                lambda live, *_: (live, nothing),
                lambda live, *rest: step(live, *rest),
                live,
                *rows_and_key,
            )
            return (live, stopped | (metrics["stopped"] > 0)), metrics

        def epoch(carry, key):
            deal_key, loss_key = jax.random.split(key)
            dealt = minibatch_rows(deal_key, units, config.minibatches, first_block)
            rows = (dealt[:, :, None] * unit + jnp.arange(unit)[None, None]).reshape(
                config.minibatches, -1
            )
            with jax.named_scope("minibatches"):
                return jax.lax.scan(
                    minibatch, carry, (rows, jax.random.split(loss_key, config.minibatches))
                )

        live = (state.params, state.opt_state)
        carry = (live, jnp.zeros((), bool)) if watched else live
        with jax.named_scope("epochs"):
            carry, metrics = jax.lax.scan(epoch, carry, jax.random.split(key, config.epochs))
        params, opt_state = carry[0] if watched else carry
        return state.replace(params=params, opt_state=opt_state), _summary(metrics)

    return update


def rescored(make: Callable) -> Callable:
    """A maker of updates like `make`, whose old log-probs are the scorer's own and not
    the sampler's, as where the two are two programs. The metric `first_ratio_off` says
    how far they are from each other.
    """

    def make_rescored(
        model: Model, parts: Parts, config: Config, *, axis_name: str | None = None
    ) -> Callable:
        update = make(model, parts, config, axis_name=axis_name)

        def again(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict]:
            whole = lora.merge(state.frozen["base"], state.params)
            guide = loss_constants(state, parts, config).lagged
            scores = policy.token_logprobs(
                model, whole, batch.rollout, config=config, with_values=False, guide=guide
            )
            own = masked.keep(jax.lax.stop_gradient(scores.logprobs), batch.rollout.mask)
            state, metrics = update(state, batch.replace(old_logprobs=own), key)
            return state, metrics | {
                "first_ratio_off": ratio_off(own, batch.old_logprobs, batch.rollout.mask, axis_name)
            }

        return again

    return make_rescored


def accumulated(
    grad_fn: Callable,
    params: Params,
    fixed: LossConstants,
    weights: Array,
    batch: Batch,
    key: Array,
    *,
    microbatches: int,
) -> tuple[tuple[Array, dict], Params]:
    """((loss, metrics), gradients) of a minibatch, computed in `microbatches` parts of
    whole groups and summed: the same numbers with less memory, since the weights
    already know the whole minibatch.
    """
    if microbatches == 1:
        (loss, metrics), grads = grad_fn(params, fixed, weights, batch, key)
        return (loss, means(metrics)), grads
    cut = lambda x: x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:])
    parts = jax.tree.map(cut, (weights, batch))

    def add(total, part_and_key):
        (weights, batch), key = part_and_key
        (loss, metrics), grads = grad_fn(params, fixed, weights, batch, key)
        (old_loss, old_metrics), old_grads = total
        joined = {name: x + old_metrics[name] for name, x in metrics.items()}
        joined["ratio_off"] = jnp.maximum(metrics["ratio_off"], old_metrics["ratio_off"])
        return ((old_loss + loss, joined), jax.tree.map(jnp.add, old_grads, grads)), None

    keys = jax.random.split(key, microbatches)
    shapes = jax.eval_shape(grad_fn, params, fixed, *jax.tree.map(lambda x: x[0], parts), keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    with jax.named_scope("microbatches"):
        ((loss, metrics), grads), _ = jax.lax.scan(add, zeros, (parts, keys))
    return (loss, means(metrics)), grads


def means(metrics: dict) -> dict:
    """Sums over tokens become means; what is a maximum stays."""
    tokens = jnp.maximum(metrics[TOKENS], 1)
    return {
        name: x if name == "ratio_off" else x / tokens
        for name, x in metrics.items()
        if name != TOKENS
    }


def _summary(metrics: dict) -> dict:
    """Means over the minibatches that counted; the ratio of the first one of all; how
    many were skipped or left out.
    """
    good = (metrics["skipped"] == 0) & (metrics["stopped"] == 0) & (metrics["empty"] == 0)
    counts = ("skipped", "stopped", "empty")
    alone = ("ratio_off", *counts)
    out = {name: masked.mean(x, good) for name, x in metrics.items() if name not in alone}
    # On the first minibatch nothing has changed yet, so anything but 1 is a
    # disagreement of sampler and scorer.
    out["first_ratio_off"] = metrics["ratio_off"][0, 0]
    out["last_approx_kl"] = _last_measured(metrics)
    return (
        out
        | {name: metrics[name].sum() for name in counts}
        | {"updates": jnp.asarray(good.size, jnp.float32)}
    )


def _last_measured(metrics: dict) -> Float[Array, ""]:
    """How far the whole step has gone, which PPO's rule for beta asks: nats a token in
    the last epoch in which they were measured, the minibatch that stopped the rest
    included. 0 where there is none.
    """
    # after the stop nothing is
    computed = (metrics["stopped"] == 0) | (metrics["approx_kl"] > 0)
    measured = (metrics["skipped"] == 0) & (metrics["empty"] == 0) & computed
    epochs = measured.any(1)
    last = epochs.shape[0] - 1 - jnp.argmax(epochs[::-1])
    return masked.mean(metrics["approx_kl"][last], measured[last])


def ratio_off(
    logprobs: Array, old_logprobs: Array, mask: Array, axis_name: str | None
) -> Float[Array, ""]:
    """The largest |ratio − 1| of all tokens, over all devices."""
    largest = jnp.abs(jnp.where(mask > 0, jnp.exp(logprobs - old_logprobs), 1.0) - 1).max()
    return largest if axis_name is None else jax.lax.pmax(largest, axis_name)
