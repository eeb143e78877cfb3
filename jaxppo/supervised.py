"""Supervised training: language modelling, fine-tuning, reward models and preferences.

An `Objective` defines the loss of a token, a row or a pair of rows; `make_train_step`
turns it into `train_step(state, prompts) -> (state, metrics)`, one update, with the
state of `ppo.init_state`. Rows are `Prompts` of `config.length` tokens; `extra` holds
what each objective also needs:

    language_model        weight Float[B L]: of each token as a prediction from those
                          before it; 0 on padding (and on a prompt)
    bradley_terry         nothing: rows 2i and 2i + 1 are the better and the worse text
    binary_cross_entropy  label Float[B]: the probability that the text is positive
    cross_entropy         label: the same, or the number of the text's class
    dpo                   weight Float[B L], and pairs as above
    with audio            context Float[B F M], context_length Int[B] (`policy.context`)
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxppo import masked, optimizers, packing, policy
from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.losses import preference
from jaxppo.models import copies, lora, text_classifier
from jaxppo.models.text_classifier import Classifier
from jaxppo.packing import Part
from jaxppo.policy import last_value
from jaxppo.rollout import reference_params
from jaxppo.types import Model, Params, Prompts, Rollout, TrainState
from jaxppo.update import accumulate_gradients

Costs = tuple[Array, dict[str, Array]]  # the loss of each item, and its metrics


class Objective(NamedTuple):
    """The loss Σ w cost / Σ w of items: rows [B], pairs [B / 2], tokens [B L − 1]."""

    weights: Callable[[Prompts], Array]
    # costs(parameters, reference, rows, dropout key);
    # of packed rows: part= for items that are tokens, total= for pairs
    costs: Callable[..., Costs]
    unit: int = 1  # rows of an item: 2 for pairs
    packs: bool = False  # its costs come from log-probs of tokens, which parts can compute


def make_train_step(
    model: Model, objective: Objective, config: Config, *, axis_name: str | None = None
) -> Callable:
    """The train step of an objective. Metrics are means over the items. Raises
    UserError for several updates a step, or a pair split between devices.
    """
    if config.epochs * config.minibatches != 1:
        raise UserError("a supervised step is one update: use --epochs 1 --minibatches 1")
    optimizer = optimizers.make_optimizer(config)
    grad_fn = jax.value_and_grad(_make_loss(objective), has_aux=True)
    packed = objective.packs and packing.is_packed(model, config)

    def train_step(state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        own, unit = prompts.index.shape[0], objective.unit
        if own % unit:
            raise UserError(
                f"each device has {own} rows, but they come in pairs: make --batch-size a multiple"
                f" of {unit} a device"
            )
        frozen = {**state.frozen, "base": policy.cast(state.frozen["base"], model.dtype)}
        prompts = left_aligned(prompts) if packed else prompts
        weights = normalised_weights(objective, prompts, axis_name)
        key = jax.random.fold_in(state.key, state.step)
        key = jax.random.fold_in(key, prompts.index[0])  # other noise on each device
        known = (state.params, frozen, weights, prompts)
        if packed:
            rows = as_response(prompts, config)[0]
            total = packing.make_sum(
                model, config, rows, rows.mask, group_size=1, axes=(axis_name,)
            )
            if unit == 1:
                one = lambda part: grad_fn(*known, jax.random.fold_in(key, part.number), part=part)
                (loss, (metrics, _)), grads = total(one)
            else:  # the two rows of a pair may be in different parts
                (loss, (metrics, _)), grads = grad_fn(*known, key, total=total)
        else:
            (loss, (metrics, _)), grads = accumulate_gradients(
                grad_fn, *known, key, microbatches=config.microbatches
            )
        if axis_name is not None:
            loss, metrics, grads = jax.lax.psum((loss, metrics, grads), axis_name)
        norm = optax.tree.norm(grads)
        # Without any weight the gradient is 0, but Adam's moments move the parameters.
        some = masked.total(weights, jnp.ones_like(weights), axis_name=axis_name) > 0
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & some
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        good &= jnp.isfinite(optax.tree.norm(updates))
        new = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda n, o: jnp.where(good, n, o), new, (state.params, state.opt_state)
        )
        ones = jnp.ones_like(prompts.index)
        skipped = 1.0 - good.astype(jnp.float32)
        counters = {
            **state.counters,
            "skipped_updates": state.counters["skipped_updates"] + skipped.astype(jnp.int32),
            "barren_steps": jnp.where(good, 0, state.counters["barren_steps"] + 1),
        }
        metrics |= {
            "loss": loss,
            "grad_norm": norm,
            "skipped": skipped,
            "barren_steps": counters["barren_steps"].astype(jnp.float32),
            "length": masked.mean(prompts.mask.sum(1), ones, axis_name=axis_name),
        }
        rows = masked.total(ones, ones, axis_name=axis_name).astype(jnp.int32)
        return state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            statistics=copies.follow(
                state.replace(params=params), state.statistics, config, copies.AFTER
            ),
            counters=counters,
            cursor=state.cursor + rows,
        ), metrics

    return train_step


def make_evaluation(model: Model, objective: Objective) -> Callable:
    """evaluate(params, frozen, prompts) -> (sums over the items, Σ w), no dropout."""
    loss_fn = _make_loss(objective)

    def evaluate(
        params: Params, frozen: Params, prompts: Prompts
    ) -> tuple[dict[str, Array], Array]:
        frozen = {**frozen, "base": policy.cast(frozen["base"], model.dtype)}
        weights = objective.weights(prompts)
        loss, (metrics, _) = loss_fn(params, frozen, weights, prompts, None)
        return {"loss": loss} | metrics, weights.sum()

    return evaluate


def normalised_weights(objective: Objective, prompts: Prompts, axis_name: str | None) -> Array:
    """The weights of the items, with sum 1 over all devices."""
    weights = objective.weights(prompts)
    total = masked.total(weights, jnp.ones_like(weights), axis_name=axis_name)
    return weights / jnp.maximum(total, 1e-8)


def _make_loss(objective: Objective) -> Callable:
    """As `update.make_loss`, without log-probs."""

    def loss_fn(
        params: Params, frozen: Params, weights: Array, prompts: Prompts, key, **packed
    ) -> tuple[Array, tuple[dict, None]]:
        whole = lora.merge(frozen["base"], params)
        reference = reference_params(frozen)
        costs, metrics = objective.costs(whole, reference, prompts, key, **packed)
        metrics = jax.lax.stop_gradient(metrics)
        sums = {name: (weights * x).sum() for name, x in metrics.items()}
        return (weights * costs).sum(), (sums, None)

    return loss_fn


def left_aligned(prompts: Prompts) -> Prompts:
    """The rows with their padding on the right, their weights too."""
    length = prompts.mask.shape[1]
    first = jnp.argmax(prompts.mask, 1)[:, None]
    columns = (jnp.arange(length)[None] + first) % length
    move = lambda x: jnp.take_along_axis(x, columns, 1)
    extra = {**prompts.extra, "weight": move(prompts.extra["weight"])}
    return prompts.replace(tokens=move(prompts.tokens), mask=move(prompts.mask), extra=extra)


def as_response(
    prompts: Prompts, config: Config, *, last: int | None = None
) -> tuple[Rollout, Config]:
    """The rows as responses to their first token, or their `last` tokens to the others;
    and settings without temperature and nucleus.
    """
    length = prompts.mask.shape[1] - 1
    weight = prompts.mask.astype(jnp.float32)[:, -min(last or length, length) :]
    zeros = jnp.zeros_like(weight)
    rollout = Rollout(
        tokens=prompts.tokens,
        attend=prompts.mask,
        mask=weight,
        finished=weight[:, 0] > 0,
        logprobs=zeros,
        raw_logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        extra=prompts.extra,
        index=prompts.index,
    )
    return rollout, dataclasses.replace(config, temperature=1.0, top_k=0, top_p=1.0)


def _token_weights(prompts: Prompts) -> Array:
    """Weights [B L − 1]; 0 after padding, where the state has no context."""
    known = prompts.mask[:, 1:] & prompts.mask[:, :-1]
    return prompts.extra["weight"][:, 1:] * known


def language_model(model: Model, config: Config, *, last: int | None = None) -> Objective:
    """−log p(token | previous tokens), weighted by `extra["weight"]`. Metrics: entropy,
    and `token_accuracy`, the share of likeliest tokens. With `last`, only the last so
    many tokens of a row get logits: most of a small network's work.
    """

    def costs(params, reference, prompts, key, part: Part | None = None) -> Costs:
        rollout, plain = as_response(prompts, config, last=last)
        found = policy.response_logprobs(
            model,
            params,
            rollout,
            config=plain,
            with_values=False,
            with_likeliest=True,
            dropout_key=key,
            part=part,
        )
        return -found.raw_logprobs, {"entropy": found.entropy, "token_accuracy": found.likeliest}

    weights = lambda prompts: _token_weights(prompts)[:, -(last or prompts.mask.shape[1]) :]
    return Objective(weights, costs, packs=last is None)


def bradley_terry(model: Model, *, margin: float = 0.0, centring: float = 0.0) -> Objective:
    """−log σ(s_w − s_l − margin) + centring · (s_w + s_l)² for the scores of a pair
    (https://arxiv.org/abs/2203.02155; margin: https://arxiv.org/abs/2307.09288;
    centring: https://arxiv.org/abs/2312.09244).
    """

    def costs(params, reference, prompts, key) -> Costs:
        score = last_value(model, params, prompts.tokens, prompts.mask, dropout_key=key)
        better, worse = score[0::2], score[1::2]
        loss = -jax.nn.log_sigmoid(better - worse - margin) + centring * jnp.square(better + worse)
        return loss, {"accuracy": (better > worse).astype(jnp.float32), "gap": better - worse}

    return Objective(_ones(2), costs, unit=2)


def binary_cross_entropy(model: Model) -> Objective:
    """Cross-entropy of the value at the last token with a probability `label`."""

    def costs(params, reference, prompts, key) -> Costs:
        logits = last_value(model, params, prompts.tokens, prompts.mask, dropout_key=key)
        return _classification(logits, prompts.extra["label"])

    return Objective(_ones(1), costs)


def cross_entropy(net: Classifier) -> Objective:
    """Cross-entropy of a text classifier with `label`, a class or a probability."""

    def costs(params, reference, prompts, key) -> Costs:
        tokens_first = jnp.argsort(~prompts.mask, axis=1)  # its padding is on the right
        tokens, mask = (
            jnp.take_along_axis(x, tokens_first, 1) for x in (prompts.tokens, prompts.mask)
        )
        logits = text_classifier.logits(net, params, tokens, mask, dropout_key=key)
        return _classification(logits, prompts.extra["label"])

    return Objective(_ones(1), costs)


def dpo(
    model: Model, config: Config, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Objective:
    """`losses.dpo` on the summed log-probs of each text's weighted tokens."""

    def costs(params, reference, prompts, key, total=None) -> Costs:
        rollout, plain = as_response(prompts, config)

        def of_rows(params: Params, part: Part | None, key=None) -> Array:
            if key is not None and part is not None:
                key = jax.random.fold_in(key, part.number)
            found = policy.response_logprobs(
                model, params, rollout, config=plain, with_values=False, dropout_key=key, part=part
            )
            return (found.raw_logprobs * _token_weights(prompts)).sum(1)

        reference = jax.lax.stop_gradient(reference)
        if total is None:
            own, ref = of_rows(params, None, key), of_rows(reference, None)
        else:
            own = packing.differentiable(total, partial(of_rows, key=key))(params)
            ref = total(partial(of_rows, reference))
        gap = (own - ref)[0::2] - (own - ref)[1::2]
        pairs = (own[0::2], own[1::2], ref[0::2], ref[1::2])
        loss = preference.dpo(*pairs, beta=beta, label_smoothing=label_smoothing)
        return loss, {"accuracy": (gap > 0).astype(jnp.float32), "gap": beta * gap}

    return Objective(_ones(2), costs, unit=2, packs=True)


def _ones(unit: int) -> Callable[[Prompts], Array]:
    return lambda prompts: jnp.ones(prompts.index.shape[0] // unit)


def _classification(logits: Array, label: Array) -> Costs:
    """Cross-entropy and accuracy of logits: [B] for two classes, [B C] for C."""
    if logits.ndim == 1:
        loss = optax.sigmoid_binary_cross_entropy(logits, label)
        right = (logits > 0) == (label > 0.5)
    else:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label.astype(jnp.int32))
        right = logits.argmax(1) == label
    return loss, {"accuracy": right.astype(jnp.float32)}
