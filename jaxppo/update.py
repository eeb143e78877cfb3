"""From a batch of rollouts to new parameters: loss assembly, gradients, Optax, epochs x minibatches as two scans."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxppo import masked, policy
from jaxppo.config import Config
from jaxppo.models import lora
from jaxppo.types import Batch, Model, Params, Parts, TrainState


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Global-norm clipping, then Adam with eps 1e-5 by default (Huang et al. 2022, "The 37 implementation details of PPO")."""
    rate = config.lr
    if config.lr_schedule == "linear":
        rate = optax.linear_schedule(config.lr, 0.0, config.updates)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(eps=config.adam_eps),
        optax.scale_by_learning_rate(rate),
    )


def deal(key: Array, units: int, minibatches: int, first_block: Int[Array, ""] | int = 0) -> Int[Array, "M K"]:
    """Which units (rows, or whole groups) of this device each minibatch gets: [minibatches, units / minibatches].

    Units are dealt in blocks of `minibatches`: block b is permuted with fold_in(key, b), b counted over all devices, and gives
    one unit to each minibatch. So minibatches are the same on any number of devices and no row moves between them.
    """
    blocks = units // minibatches
    shuffle = lambda b: jax.random.permutation(jax.random.fold_in(key, first_block + b), minibatches)
    order = jax.vmap(shuffle)(jnp.arange(blocks)) + minibatches * jnp.arange(blocks)[:, None]
    return order.T


def make_loss(model: Model, parts: Parts, config: Config, axis_name: str | None) -> Callable:
    """loss(params, base, minibatch, key) -> (loss, metrics). The weights carry the GLOBAL denominator, so gradients are summed
    over devices, never averaged:  Σ w (policy loss − c_H entropy) + c_V Σ w value loss."""

    def loss_fn(params: Params, base: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict]:
        mask = batch.mask
        scores = policy.score(
            model, lora.merge(base, params), batch.rollout, config=config, with_values=parts.value_loss is not None
        )
        weights = parts.aggregate(mask, axis_name=axis_name)
        per_token, diagnostics = parts.policy_loss(scores.logprobs, batch.old_logprobs, batch.advantages, mask, key=key)
        if parts.correction is not None:
            per_token = per_token * parts.correction(batch.old_logprobs, batch.rollout.logprobs, mask)
        entropy = jnp.where(mask > 0, scores.entropy, 0.0)
        total = (weights * (per_token - config.entropy_coef * entropy)).sum()
        diagnostics |= {"policy_loss": per_token, "entropy": entropy}
        if parts.value_loss is not None:
            value = jnp.where(mask > 0, parts.value_loss(scores.values, batch.rollout.values, batch.returns), 0.0)
            total = total + config.value_coef * (weights * value).sum()
            diagnostics["value_loss"] = value
        diagnostics, logprobs = jax.lax.stop_gradient((diagnostics, scores.logprobs))  # a maximum over devices has no derivative
        metrics = {name: masked.mean(x, mask, axis_name=axis_name) for name, x in diagnostics.items()}
        ratio = jnp.where(mask > 0, jnp.exp(logprobs - batch.old_logprobs), 1.0)
        metrics["ratio_off"] = _maximum(jnp.abs(ratio - 1).max(), axis_name)
        return total, metrics

    return loss_fn


def make_update(model: Model, parts: Parts, config: Config, *, axis_name: str | None = None) -> Callable:
    """update(state, batch, key) -> (state, metrics): all epochs and minibatches. One non-finite minibatch changes nothing."""
    optimizer = make_optimizer(config)
    grad_fn = jax.value_and_grad(make_loss(model, parts, config, axis_name), has_aux=True)

    def minibatch(carry, rows_and_key, *, base, batch):
        params, opt_state = carry
        rows, key = rows_and_key
        (loss, metrics), grads = grad_fn(params, base, jax.tree.map(lambda x: x[rows], batch), key)
        if axis_name is not None:  # sums, not means: the weights already divide by the global count
            loss, grads = jax.lax.psum((loss, grads), axis_name)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = (optax.apply_updates(params, updates), new_opt_state)
        # A select, not a branch: XLA fuses it into Adam's own loops, where a `cond` would copy the parameters.
        carry = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, (params, opt_state))
        return carry, metrics | {"loss": loss, "grad_norm": norm, "skipped": 1.0 - good.astype(jnp.float32)}

    def update(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict]:
        unit = config.group_size
        units = batch.mask.shape[0] // unit
        blocks = units // config.minibatches
        first_block = 0 if axis_name is None else jax.lax.axis_index(axis_name) * blocks
        step = partial(minibatch, base=state.frozen["base"], batch=batch)

        def epoch(carry, key):
            deal_key, loss_key = jax.random.split(key)
            dealt = deal(deal_key, units, config.minibatches, first_block)
            rows = (dealt[:, :, None] * unit + jnp.arange(unit)[None, None]).reshape(config.minibatches, -1)
            return jax.lax.scan(step, carry, (rows, jax.random.split(loss_key, config.minibatches)))

        carry = (state.params, state.opt_state)
        (params, opt_state), metrics = jax.lax.scan(epoch, carry, jax.random.split(key, config.epochs))
        return state.replace(params=params, opt_state=opt_state), _summary(metrics)

    return update


def _summary(metrics: dict) -> dict:
    """Means over the good minibatches; the ratio of the first one of all; the number skipped."""
    good = metrics["skipped"] == 0
    out = {name: masked.mean(x, good) for name, x in metrics.items() if name not in ("ratio_off", "skipped")}
    # On the first minibatch nothing has changed yet, so anything but 1 is a disagreement of sampler and scorer.
    return out | {"first_ratio_off": metrics["ratio_off"][0, 0], "skipped": metrics["skipped"].sum()}


def _maximum(x, axis_name):
    return x if axis_name is None else jax.lax.pmax(x, axis_name)
