"""The stages before: language modelling, fine-tuning, reward models and preferences, as
train steps.

An `Objective` says what a row costs; `make_train_step` makes of it `train_step(state,
prompts) -> (state, metrics)` with the state of `ppo.init_state`: jit, pmap, mesh,
checkpoints, resume and the loop are those of every other run. One step, one update.

Rows are `Prompts` of `config.length` tokens; what an objective asks beside them stands
in `extra`:

    language_model   weight Float[B L]: of each token as a prediction from those before it; 0 on padding (and on a prompt). The
                     first token of a row has nothing before it and no weight, whatever
                     stands there
    bradley_terry    nothing: rows 2i and 2i + 1 are the better and the worse text of a pair
    labels           label Float[B]: the probability that the text is positive
    classes          the same, or the number of the text's class
    dpo              weight Float[B L], and pairs as above; the reference is that of the state

A policy that hears recordings has them in `extra` too: context Float[B F M],
context_length Int[B] (`policy.context`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxppo import masked, optimizers, policy
from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.losses import preference
from jaxppo.models import lora
from jaxppo.models.text_classifier import Classifier
from jaxppo.policy import last_value
from jaxppo.rewards import classifier
from jaxppo.rollout import reference_params
from jaxppo.types import Model, Params, Prompts, Rollout, TrainState

Costs = tuple[Array, dict[str, Array]]  # the loss of each item, and other numbers of it


class Objective(NamedTuple):
    """What a batch costs: Σ w cost / Σ w over all devices. Items are rows [B], pairs [B
    / 2], or tokens [B L − 1].
    """

    weights: Callable[[Prompts], Array]
    costs: Callable[
        [Params, Params | None, Prompts, Any], Costs
    ]  # (parameters, reference, rows, dropout key)
    unit: int = 1  # rows that belong together


def make_train_step(
    model: Model, objective: Objective, config: Config, *, axis_name: str | None = None
) -> Callable:
    """The train step of an objective. Metrics are means over the items, `length` the
    real tokens of a row.

    Raises UserError where the settings ask for several updates a step, and, when it is
    traced, for pairs that are cut between devices.
    """
    if config.epochs * config.minibatches != 1:
        raise UserError("a supervised step is one update: --epochs 1 --minibatches 1")
    optimizer = optimizers.make_optimizer(config)
    grad_fn = jax.value_and_grad(_make_loss(objective), has_aux=True)

    def train_step(state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        if prompts.index.shape[0] % objective.unit:
            own, unit = prompts.index.shape[0], objective.unit
            raise UserError(
                f"each device has {own} rows, but they come in pairs: make --batch-size a multiple of {unit} a device"
            )
        base = policy.cast(state.frozen["base"], model.dtype)
        frozen = {**state.frozen, "base": base}
        weights = normalised(objective, prompts, axis_name)
        key = jax.random.fold_in(
            jax.random.fold_in(state.key, state.step), prompts.index[0]
        )  # other noise on each device
        (loss, metrics), grads = _in_parts(
            grad_fn, config.microbatches, objective, state.params, frozen, weights, prompts, key
        )
        if axis_name is not None:
            loss, metrics, grads = jax.lax.psum((loss, metrics, grads), axis_name)
        norm = optax.tree.norm(grads)
        # A batch without weight has no gradient, but Adam's moments would move the
        # parameters yet.
        some = masked.total(weights, jnp.ones_like(weights), axis_name=axis_name) > 0
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & some
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda n, o: jnp.where(good, n, o), new, (state.params, state.opt_state)
        )
        rows = masked.total(
            jnp.ones_like(prompts.index), jnp.ones_like(prompts.index), axis_name=axis_name
        )
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
            "length": masked.mean(
                prompts.mask.sum(1), jnp.ones_like(prompts.index), axis_name=axis_name
            ),
        }
        return state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            counters=counters,
            cursor=state.cursor + rows.astype(jnp.int32),
        ), metrics

    return train_step


def make_evaluation(model: Model, objective: Objective) -> Callable:
    """evaluate(params, frozen, prompts) -> (sums over the items, Σ w), without dropout;
    add those of all batches, then divide.
    """

    def evaluate(
        params: Params, frozen: Params, prompts: Prompts
    ) -> tuple[dict[str, Array], Array]:
        whole = lora.merge(policy.cast(frozen["base"], model.dtype), params)
        weights = objective.weights(prompts)
        costs, others = objective.costs(whole, reference_params(params, frozen), prompts, None)
        return {
            name: (weights * x).sum() for name, x in ({"loss": costs} | others).items()
        }, weights.sum()

    return evaluate


def normalised(objective: Objective, prompts: Prompts, axis_name: str | None) -> Array:
    """The weights of the items, which add up to 1 over all devices."""
    weights = objective.weights(prompts)
    total = masked.total(weights, jnp.ones_like(weights), axis_name=axis_name)
    return weights / jnp.maximum(total, 1e-8)


def _make_loss(objective: Objective) -> Callable:
    def loss_fn(
        params: Params, frozen: Params, weights: Array, prompts: Prompts, key
    ) -> tuple[Array, dict]:
        whole = lora.merge(frozen["base"], params)
        costs, others = objective.costs(whole, reference_params(params, frozen), prompts, key)
        return (weights * costs).sum(), {
            name: (weights * x).sum() for name, x in jax.lax.stop_gradient(others).items()
        }

    return loss_fn


def _in_parts(
    grad_fn, parts: int, objective: Objective, params, frozen, weights, prompts: Prompts, key
):
    """Loss, metrics and gradients of a batch in `parts` microbatches of whole units,
    summed.
    """
    if parts == 1:
        return grad_fn(params, frozen, weights, prompts, key)
    units = prompts.index.shape[0] // objective.unit
    if units % parts:
        raise UserError(
            f"--microbatches {parts} does not divide the {units} rows or pairs of a device"
        )
    cut = lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
    pieces = (*jax.tree.map(cut, (weights, prompts)), jax.random.split(key, parts))
    shapes = jax.eval_shape(grad_fn, params, frozen, *jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, piece: (jax.tree.map(jnp.add, total, grad_fn(params, frozen, *piece)), None)
    return jax.lax.scan(add, zeros, pieces)[0]


def as_response(
    prompts: Prompts, config: Config, *, last: int | None = None
) -> tuple[Rollout, Config]:
    """The rows as responses to their first token (or their `last` tokens as responses
    to the others), and the settings under which a token's log-prob is the model's
    own.
    """
    length = prompts.mask.shape[1] - 1
    weight = prompts.mask.astype(jnp.float32)[:, -min(last or length, length) :]
    row = jnp.zeros_like(weight)
    rolled = Rollout(
        prompts.tokens,
        prompts.mask,
        weight,
        weight[:, 0] > 0,
        row,
        row,
        row,
        row,
        prompts.extra,
        prompts.index,
    )
    return rolled, _plain(config)


def _predicted(prompts: Prompts) -> Array:
    """[B L - 1] the weight of each token but the first slot's: 0 where nothing stands
    before it, since the slot before would be padding, which sees all of the row.
    """
    known = prompts.mask[:, 1:] & prompts.mask[:, :-1]
    return prompts.extra["weight"][:, 1:] * known


def _plain(config: Config) -> Config:
    return dataclasses.replace(config, temperature=1.0, top_k=0, top_p=1.0)


def language_model(model: Model, config: Config, *, last: int | None = None) -> Objective:
    """−log p(token | those before it), a mean over tokens with `extra["weight"]`:
    fine-tuning gives the prompt's tokens 0. Beside it `token_accuracy`: the share of
    them that are the likeliest.

    `last`: only the last so many tokens of a row can have weight (a response's): the
    others get no logits, which are most of the work of a small network with a large
    vocabulary.
    """

    def costs(params, reference, prompts, key) -> Costs:
        rolled, plain = as_response(prompts, config, last=last)
        scores = policy.token_logprobs(
            model,
            params,
            rolled,
            config=plain,
            with_values=False,
            with_likeliest=True,
            dropout_key=key,
        )
        return -scores.raw_logprobs, {"entropy": scores.entropy, "token_accuracy": scores.likeliest}

    def weights(prompts: Prompts) -> Array:
        return _predicted(prompts)[:, -(last or prompts.mask.shape[1]) :]

    return Objective(weights, costs)


def bradley_terry(model: Model, *, margin: float = 0.0, centring: float = 0.0) -> Objective:
    """−log σ(s_w − s_l − margin) + centring · (s_w + s_l)² of a pair's scores (Ouyang
    et al. 2022, https://arxiv.org/abs/2203.02155; margin:
    https://arxiv.org/abs/2307.09288; centring: https://arxiv.org/abs/2312.09244).
    """

    def costs(params, reference, prompts, key) -> Costs:
        score = last_value(model, params, prompts.tokens, prompts.mask, dropout_key=key)
        better, worse = score[0::2], score[1::2]
        loss = -jax.nn.log_sigmoid(better - worse - margin) + centring * jnp.square(better + worse)
        return loss, {"accuracy": (better > worse).astype(jnp.float32), "gap": better - worse}

    return Objective(lambda prompts: jnp.ones(prompts.index.shape[0] // 2), costs, unit=2)


def labels(model: Model) -> Objective:
    """Binary cross-entropy of the last token's value with `extra["label"]`, a
    probability; accuracy of its side of 1/2.
    """

    def costs(params, reference, prompts, key) -> Costs:
        return _told(
            last_value(model, params, prompts.tokens, prompts.mask, dropout_key=key),
            prompts.extra["label"],
        )

    return Objective(lambda prompts: jnp.ones(prompts.index.shape[0]), costs)


def classes(net: Classifier) -> Objective:
    """Cross-entropy of a net that reads a text (`models.reading`) with
    `extra["label"]`: the number of one of its classes, or, of a net with one, a
    probability as in `labels`; accuracy. Parameters as in `rewards.classifier`.
    """

    def costs(params, reference, prompts, key) -> Costs:
        # the net's padding stands behind a text
        first = jnp.argsort(~prompts.mask, axis=1)
        tokens, mask = (jnp.take_along_axis(x, first, 1) for x in (prompts.tokens, prompts.mask))
        return _told(
            classifier.logits(net, params, tokens, mask, dropout_key=key), prompts.extra["label"]
        )

    return Objective(lambda prompts: jnp.ones(prompts.index.shape[0]), costs)


def _told(logits: Array, label: Array) -> Costs:
    """Cross-entropy and accuracy of logits [B] with probabilities, or of [B C] with the
    numbers of classes.
    """
    if logits.ndim == 1:
        loss, right = (
            optax.sigmoid_binary_cross_entropy(logits, label),
            (logits > 0) == (label > 0.5),
        )
    else:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label.astype(jnp.int32))
        right = logits.argmax(1) == label
    return loss, {"accuracy": right.astype(jnp.float32)}


def dpo(
    model: Model, config: Config, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Objective:
    """`losses.dpo` on the summed log-probs of each text's weighted tokens, against the
    state's reference.
    """

    def costs(params, reference, prompts, key) -> Costs:
        rolled, plain = as_response(prompts, config)
        weight = _predicted(prompts)
        one = lambda p, k: (
            policy.token_logprobs(
                model, p, rolled, config=plain, with_values=False, dropout_key=k
            ).raw_logprobs
            * weight
        ).sum(1)
        own, theirs = one(params, key), jax.lax.stop_gradient(one(reference, None))
        pairs = (own[0::2], own[1::2], theirs[0::2], theirs[1::2])
        gap = (own - theirs)[0::2] - (own - theirs)[1::2]
        loss = preference.dpo(*pairs, beta=beta, label_smoothing=label_smoothing)
        return loss, {"accuracy": (gap > 0).astype(jnp.float32), "gap": beta * gap}

    return Objective(lambda prompts: jnp.ones(prompts.index.shape[0] // 2), costs, unit=2)
