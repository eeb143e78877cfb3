"""From a batch of rollouts to new parameters: the loss, its gradient, an Optax update,
and epochs x minibatches as two nested scans.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxppo import distillation, masked, optimizers, packing, policy, sampling
from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.losses import correction, token
from jaxppo.losses.shared import log_ratio
from jaxppo.models import lora
from jaxppo.packing import Part, only
from jaxppo.rollout import reference_params
from jaxppo.types import Batch, Model, Params, Parts, Prompts, Scalar, TrainState


class LossConstants(NamedTuple):
    """Inputs of the loss that the epochs do not change."""

    base: Params
    reference: Params | None = None  # whole parameters, for a KL over the vocabulary
    kl_coef: Scalar = 0.0  # of a KL in the loss
    beta: Scalar = 0.0  # of a policy loss with `Parts.penalty`
    teacher: Params | None = None  # whole parameters, for `Parts.divergence`


def loss_constants(state: TrainState, parts: Parts, config: Config) -> LossConstants:
    """The constants of a state's loss."""
    full = config.kl_place == "loss" and parts.full_kl
    reference = reference_params(state.frozen) if full else None
    teacher = None
    if parts.teacher is not None and parts.divergence is not None:
        teacher = distillation.teacher_params(state.frozen)
    base, controller = state.frozen["base"], state.controller
    return LossConstants(base, reference, controller["kl_coef"], controller["beta"], teacher)


def minibatch_units(
    key: Array, units: int, minibatches: int, first_block: Int[Array, ""] | int = 0
) -> Int[Array, "M K"]:
    """The units (rows, or whole groups) of this device in each minibatch:
    [minibatches, units / minibatches].

    Block b of `minibatches` units, b counted over all devices, is permuted with
    fold_in(key, b) and gives one unit to each minibatch. So minibatches are the same on
    any number of devices, and no row moves between devices.
    """
    blocks = units // minibatches
    shuffle = lambda b: jax.random.permutation(
        jax.random.fold_in(key, first_block + b), minibatches
    )
    order = jax.vmap(shuffle)(jnp.arange(blocks)) + minibatches * jnp.arange(blocks)[:, None]
    return order.T


def make_loss(model: Model, parts: Parts, config: Config) -> Callable:
    """loss(params, constants, weights, batch, key, part) ->
    (loss, (metrics, logprobs)):
    Σ w (policy loss + c_KL KL + c_T D − c_H entropy) + c_V Σ w value loss, D being the
    divergence from a teacher; and with a likelihood term − μ Σ w' log π, over right
    answers alone.

    The weights [B T] carry the GLOBAL denominator of their minibatch, so losses and
    gradients are summed over devices and microbatches, never averaged. Metrics are sums
    over tokens. With a part (`packing.py`), only its rows count, and the log-probs of
    the others are 0.
    """

    def loss_fn(
        params: Params,
        constants: LossConstants,
        weights: Array,
        batch: Batch,
        key: Array,
        part: Part | None = None,
    ) -> tuple[Float[Array, ""], tuple[dict, Float[Array, "B T"]]]:
        batch, weights = batch.replace(mask=only(part, batch.mask)), only(part, weights)
        mask, rolled = batch.mask, batch.rollout
        has_critic = parts.value_loss is not None
        whole = lora.merge(constants.base, params)
        against = None
        if parts.teacher is not None and parts.divergence is not None:
            assert constants.teacher is not None
            diverge = distillation.against(
                parts.teacher, constants.teacher, parts.divergence, config=config
            )
            against = diverge, rolled.extra["teacher_states"]
        new = policy.response_logprobs(
            model, whole, rolled, config=config, with_values=has_critic, against=against, part=part
        )
        settings = {"beta": constants.beta} if parts.penalty else {}
        per_token, diagnostics = parts.policy_loss(
            new.logprobs, batch.old_logprobs, batch.advantages, mask, key=key, **settings
        )
        factors = [] if batch.weights is None else [batch.weights]
        if config.off_policy_threshold:
            near, threshold = correction.off_policy_mask, config.off_policy_threshold
            logprobs = new.logprobs, rolled.logprobs
            factors.append(near(*logprobs, batch.advantages, mask, threshold=threshold))
        if factors:
            diagnostics = {**diagnostics, "weight": math.prod(factors)}
            per_token = per_token * diagnostics["weight"]
        diagnostics = {**diagnostics, "policy_loss": per_token}
        if config.kl_place == "loss":
            kl = _kl_loss(model, parts, config, whole, constants, batch, new, part)
            per_token = per_token + constants.kl_coef * kl
            diagnostics["kl_loss"] = kl
        if against is not None:
            diagnostics["teacher_loss"] = masked.keep(new.divergence, mask)
            per_token = per_token + config.distil_coef * diagnostics["teacher_loss"]
        entropy = masked.keep(new.entropy, mask)
        total = (weights * (per_token - config.entropy_coef * entropy)).sum()
        diagnostics["entropy"] = entropy
        if parts.value_loss is not None:
            value = parts.value_loss(new.values, rolled.values, batch.returns)
            diagnostics["value_loss"] = masked.keep(value, mask)
            total = total + config.value_coef * (weights * diagnostics["value_loss"]).sum()
        if config.likelihood_coef:
            right = {"scores": batch.scores, "threshold": config.likelihood_threshold}
            diagnostics["likelihood_loss"] = token.likelihood(new.logprobs, mask=mask, **right)
            total += config.likelihood_coef * (batch.right * diagnostics["likelihood_loss"]).sum()
        diagnostics, logprobs = jax.lax.stop_gradient((diagnostics, new.logprobs))
        metrics = {name: masked.total(x, mask) for name, x in diagnostics.items()}
        return total, (metrics, logprobs)

    return loss_fn


def _kl_loss(
    model,
    parts: Parts,
    config: Config,
    whole: Params,
    constants: LossConstants,
    batch: Batch,
    new,
    part,
) -> Float[Array, "B T"]:
    """The KL to the reference as a term of the loss, 0 at padding."""
    mask, rolled = batch.mask, batch.rollout
    if parts.full_kl:
        assert constants.reference is not None
        value = policy.full_kl(
            model, whole, constants.reference, rolled, config=config, divergence=parts.kl, part=part
        )
        value = masked.keep(value, mask)
    else:
        logprobs = (masked.keep(x, mask) for x in (new.raw_logprobs, rolled.ref_logprobs))
        value = parts.kl(*logprobs)
    if not config.kl_importance:
        return value
    # With the ratio's gradient, the gradient is that of the divergence for any
    # estimator.
    return value * jnp.exp(log_ratio(new.logprobs, batch.old_logprobs, mask))


def make_update(
    model: Model,
    parts: Parts,
    config: Config,
    *,
    axis_name: str | None = None,
    stop_axis: str | None = None,
    critic_alone: bool = False,
) -> Callable:
    """update(state, batch, key) -> (state, metrics): all epochs and minibatches.

    A minibatch that is not finite, or empty, changes nothing. Once the KL to the
    sampling policy exceeds `kl_stop` nats a token, the rest of the step is skipped. In
    the first `critic_warmup` steps, or always with `critic_alone`, only the critic's
    own parameters are trained.
    """
    optimizer = optimizers.make_optimizer(config)
    grad_fn = jax.value_and_grad(make_loss(model, parts, config), has_aux=True)

    def gradient(params, constants, weights, batch, key):
        """((loss, (metrics, log-probs)), gradient), the sum of all parts."""
        if not packing.is_packed(model, config):
            return accumulate_gradients(
                grad_fn, params, constants, weights, batch, key, microbatches=config.microbatches
            )
        total = packing.make_sum(
            model,
            config,
            batch.rollout,
            batch.mask,
            group_size=config.group_size,
            axes=(axis_name, stop_axis),
        )
        return total(partial(grad_fn, params, constants, weights, batch, key))

    def train_minibatch(live, rows, key, constants, batch, alone: Bool[Array, ""] | None):
        params, opt_state = live
        mine = jax.tree.map(lambda x: x[rows], batch)
        weights = parts.aggregate(mine.mask, axis_name=axis_name)
        if config.likelihood_coef:
            right = (mine.scores > config.likelihood_threshold)[:, None]
            right = jnp.where(right, mine.mask, 0.0)
            mine = mine.replace(right=parts.aggregate(right, axis_name=axis_name))
        (loss, (sums, logprobs)), grads = gradient(params, constants, weights, mine, key)
        # sums, not means: the weights already divide by the global count
        if axis_name is not None:
            loss, grads, sums = jax.lax.psum((loss, grads, sums), axis_name)
        metrics = token_means(sums, logprobs, mine, config, axis_name)
        if alone is not None:  # before the optimizer, whose moments then see zeros
            grads = optimizers.zero_policy(grads, alone)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        stop = metrics["approx_kl"] > config.kl_stop if config.kl_stop > 0 else jnp.zeros((), bool)
        # Without valid rows the gradient is 0, but Adam's moments would move
        # parameters.
        empty = masked.total(mine.mask, mine.mask, axis_name=axis_name) == 0
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        if alone is not None:  # weight decay would move the other parameters
            updates = optimizers.zero_policy(updates, alone)
        good &= jnp.isfinite(optax.tree.norm(updates))  # Adam with eps 0 divides by 0
        new = (optax.apply_updates(params, updates), new_opt_state)
        # A select, not a branch: XLA fuses it into Adam's loops, where a `cond` would
        # copy the parameters.
        live = jax.tree.map(lambda n, o: jnp.where(good & ~stop & ~empty, n, o), new, live)
        outcome = {"skipped": ~good, "stopped": stop, "empty": empty}
        outcome = {name: x.astype(jnp.float32) for name, x in outcome.items()}
        return live, metrics | {"loss": loss, "grad_norm": norm} | outcome

    def update(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict]:
        unit = config.group_size
        units = batch.mask.shape[0] // unit
        blocks = units // config.minibatches
        first_block = 0 if axis_name is None else jax.lax.axis_index(axis_name) * blocks
        alone = state.step < config.critic_warmup if config.critic_warmup else None
        alone = jnp.ones((), bool) if critic_alone else alone
        constants = loss_constants(state, parts, config)
        sampled, batch = batch.mask, weigh(batch, parts, config, axis_name)
        step = partial(train_minibatch, constants=constants, batch=batch, alone=alone)

        def unless_stopped(carry, rows_and_key):
            live, stopped = carry
            once = jax.jit(step, inline=True)  # traced once, for its shapes and for the branch
            shapes = jax.eval_shape(once, live, *rows_and_key)[1]
            nothing = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
            nothing["stopped"] = jnp.ones(())
            skip = lambda live, *_: (live, nothing)
            live, metrics = jax.lax.cond(stopped, skip, once, live, *rows_and_key)
            return (live, stopped | (metrics["stopped"] > 0)), metrics

        def always(carry, rows_and_key):
            live, stopped = carry
            live, metrics = step(live, *rows_and_key)
            return (live, stopped), metrics

        def epoch(carry, key):
            rows_key, loss_key = jax.random.split(key)
            chosen = minibatch_units(rows_key, units, config.minibatches, first_block)
            rows = chosen[:, :, None] * unit + jnp.arange(unit)[None, None]
            rows = rows.reshape(config.minibatches, -1)
            keys = jax.random.split(loss_key, config.minibatches)
            with jax.named_scope("minibatches"):
                minibatch = unless_stopped if config.kl_stop > 0 else always
                return jax.lax.scan(minibatch, carry, (rows, keys))

        carry = ((state.params, state.opt_state), jnp.zeros((), bool))
        with jax.named_scope("epochs"):
            carry, metrics = jax.lax.scan(epoch, carry, jax.random.split(key, config.epochs))
        params, opt_state = carry[0]
        metrics = _summary(metrics)
        if parts.rejection is not None:
            left = sampled - batch.mask
            metrics["rejected"] = masked.mean(left, sampled, axis_name=axis_name)
        return state.replace(params=params, opt_state=opt_state), metrics

    return update


def weigh(batch: Batch, parts: Parts, config: Config, axis_name: str | None) -> Batch:
    """The batch without what `Parts.rejection` leaves out, and with the factors of its
    tokens: those of `Parts.correction`, and 0 below the share of `top_entropy`. All
    come from the sampler's numbers, so they are computed once for all epochs.
    """
    old, sampler, mask = batch.old_logprobs, batch.rollout.logprobs, batch.mask
    factors = []
    if parts.rejection is not None:
        mask = parts.rejection(old, sampler, mask)
    if parts.correction is not None:
        factors.append(parts.correction(old, sampler, mask, axis_name=axis_name))
    if config.top_entropy < 1:
        entropy, fraction = batch.rollout.entropy, config.top_entropy
        factors.append(
            correction.top_entropy(entropy, mask, fraction=fraction, axis_name=axis_name)
        )
    return batch.replace(mask=mask, weights=math.prod(factors) if factors else None)


def accumulate_gradients(
    grad_fn: Callable,
    params: Params,
    constants: LossConstants | Params,
    weights: Array,
    batch: Batch | Prompts,
    key: Array,
    *,
    microbatches: int,
) -> tuple[tuple[Array, tuple[dict, Any]], Params]:
    """((loss, (metrics, log-probs or None)), gradients) of a minibatch, computed in
    `microbatches` parts and summed: the same result with less memory, since the weights
    carry the denominator of the whole minibatch. In a supervised stage, a pair of rows
    may have one weight.
    """
    if microbatches == 1:
        return grad_fn(params, constants, weights, batch, key)
    if (rows := len(weights)) % microbatches:
        raise UserError(
            f"--microbatches {microbatches} does not divide the {rows} rows or pairs of a "
            "minibatch on each device"
        )
    cut = lambda x: x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:])
    parts = jax.tree.map(cut, (weights, batch))
    grad_fn = jax.jit(grad_fn, inline=True)  # traced once, for its shapes and for the loop

    def add(total, part_and_key):
        (weights, batch), key = part_and_key
        (loss, (sums, logprobs)), grads = grad_fn(params, constants, weights, batch, key)
        return jax.tree.map(jnp.add, total, (loss, sums, grads)), logprobs

    keys = jax.random.split(key, microbatches)
    first = jax.tree.map(lambda x: x[0], parts)
    (loss, (sums, _)), grads = jax.eval_shape(grad_fn, params, constants, *first, keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, sums, grads))
    with jax.named_scope("microbatches"):
        (loss, sums, grads), logprobs = jax.lax.scan(add, zeros, (parts, keys))
    whole = jax.tree.map(lambda x: x.reshape(batch.mask.shape), logprobs)
    return (loss, (sums, whole)), grads


def token_means(
    sums: dict, logprobs: Array, batch: Batch, config: Config, axis_name: str | None
) -> dict:
    """The metrics of a minibatch from sums over all devices: means over tokens, and how
    far the new log-probs of this device's rows are from the old ones.
    """
    mask, old = batch.mask, batch.old_logprobs
    moved = log_ratio(logprobs, old, mask)
    far = {"approx_kl": jnp.expm1(moved) - moved}
    if config.mask_top_p < 1 or sampling.has_keep_set(config):
        far["outside_fraction"] = (logprobs <= policy.FLOOR).astype(jnp.float32)
    total = partial(masked.total, mask=mask, axis_name=axis_name)
    tokens = jnp.maximum(total(jnp.ones_like(mask)), 1)
    found = {name: x / tokens for name, x in sums.items()}
    found |= {name: total(x) / tokens for name, x in far.items()}
    return found | {"ratio_off": ratio_off(logprobs, old, mask, axis_name)}


def _summary(metrics: dict) -> dict:
    """Metrics of the step from metrics [epochs, minibatches]: means over the
    minibatches that changed parameters, and how many were skipped, stopped or empty.
    """
    counts = ("skipped", "stopped", "empty")
    good = (metrics["skipped"] + metrics["stopped"] + metrics["empty"]) == 0
    out = {n: masked.mean(x, good) for n, x in metrics.items() if n not in ("ratio_off", *counts)}
    # Nothing has changed yet on the first minibatch, so sampler and scorer must agree.
    out["first_ratio_off"] = metrics["ratio_off"][0, 0]
    out["last_approx_kl"] = _last_approx_kl(metrics)
    return out | {n: metrics[n].sum() for n in counts} | {"updates": jnp.float32(good.size)}


def _last_approx_kl(metrics: dict) -> Float[Array, ""]:
    """Mean KL to the sampling policy, in nats a token, over the last epoch with a
    measurement; 0 without any. A minibatch that was not computed reports 0.
    """
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
