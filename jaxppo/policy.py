"""Log-probs, entropy and values of responses that have been sampled: the scorer.

Token t of a response is in slot P + t of its row, behind a prompt of P slots. The
logits of the slot before it, P + t − 1, choose it, and that slot's value is the value
of time t. The functions here do this shift, and apply the temperature.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxppo import kernels, kl, packing, sampling
from jaxppo.config import Config
from jaxppo.models import layout
from jaxppo.packing import Part
from jaxppo.types import Model, Params, PyTree, Rollout

FLOOR = -20.0  # log-prob of a token outside the keep-set of new parameters


class ResponseLogprobs(NamedTuple):
    """A response under one set of parameters."""

    logprobs: Float[Array, "B T"]  # after all processors: for ratios
    raw_logprobs: Float[Array, "B T"]  # after the temperature only: for KL
    entropy: Float[Array, "B T"]  # nats, after the temperature only
    values: Float[Array, "B T"]  # 0 unless asked for
    likeliest: Float[Array, "B T"]  # 1 where no token is likelier; 0 unless asked for
    divergence: Float[Array, "B T"]  # from another network; 0 unless asked for
    states: PyTree = None  # Float[B T D] before each token, or None


def cast(params: Params, dtype) -> Params:
    """Round matrices to the compute dtype, once, outside the decode loop. Vectors
    (norms, biases) and matrices in 8 bits stay as they are.

    >>> import jax.numpy as jnp
    >>> params = {"b": jnp.ones(2), "w": jnp.ones((2, 2))}
    >>> {k: x.dtype.name for k, x in cast(params, jnp.bfloat16).items()}
    {'b': 'float32', 'w': 'bfloat16'}
    """

    def rounded(path, x):
        names = [part.key for part in path]
        # the value head is tiny and its products are float32
        exact = "value" in names or x.dtype == jnp.int8
        dimensions = x.ndim - ("layers" in names)  # scanned layers have one more
        return x if exact or dimensions < 2 else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(rounded, dict(params))


def choices(
    logits: Float[Array, "N V"],
    tokens: Int[Array, "N"],
    *,
    config: Config,
    allowed: Bool[Array, "N V"] | None = None,
    t: Int[Array, "N"] | Int[Array, ""] | None = None,
) -> tuple[Float[Array, "N"], Float[Array, "N"], Float[Array, "N"]]:
    """(log-prob after all processors, log-prob after the temperature only, entropy) of
    one token in each row. `allowed` and `t` as in `sampling.process`.
    """
    logits = sampling.temper(logits, temperature=config.temperature)
    raw, entropy = kernels.token_logprobs(logits, tokens)
    if allowed is None and not sampling.has_keep_set(config) and not sampling.bars_eos(config):
        return raw, raw, entropy
    kept = sampling.process(logits, sample=config, allowed=allowed, t=t)
    inside = jnp.take_along_axis(kept, tokens[:, None], 1)[:, 0] > -jnp.inf
    # RL4LMs, the official NLPO, does not renormalise over the allowed tokens.
    if allowed is None or config.mask_renormalise:
        log_kept = jax.nn.logsumexp(kept, -1) - jax.nn.logsumexp(logits, -1)
    else:
        log_kept = jnp.zeros_like(raw)
    # A token may leave the keep-set during the epochs: floored, without gradient.
    logprob = jnp.where(inside, raw - jnp.where(inside, log_kept, 0.0), FLOOR)
    return logprob, raw, entropy


def response_logprobs(
    model: Model,
    params: Params,
    rollout: Rollout,
    *,
    config: Config,
    with_values: bool = True,
    with_likeliest: bool = False,
    with_states: bool = False,
    against: tuple[Callable, Array] | None = None,
    dropout_key=None,
    part: Part | None = None,
) -> ResponseLogprobs:
    """Log-probs, entropy and values of a rollout's responses under `params`.

    Logits are computed at response positions only, in chunks if they need more than
    `config.logits_bytes` (and again in the backward pass).

    Args:
      against: (divergence, array [B T ...]); `divergence(logits, x)` of the logits
        [N V] after the temperature and the rows x [N ...] of the array returns [N].
      part: compute these packed rows alone; the rows that are not among them are 0.
    """
    hidden = states_before_tokens(model, params, rollout, dropout_key=dropout_key, part=part)
    response = rollout.response if part is None else part.response
    zeros = jnp.zeros(response.shape, jnp.float32)
    values = model.value(params, hidden) if with_values else zeros

    def score(h, tokens, t=None, other=None):
        logits = model.logits(params, h)
        own = choices(logits, tokens, config=config, allowed=model.allowed(params, h), t=t)
        found = dict(zip(ResponseLogprobs._fields, own))  # the first three
        if with_likeliest:
            found["likeliest"] = _is_likeliest(logits, tokens)
        if against is not None:
            tempered = sampling.temper(logits, temperature=config.temperature)
            found["divergence"] = against[0](tempered, other)
        return found

    arrays = {"h": hidden, "tokens": response}
    if sampling.bars_eos(config):
        arrays["t"] = _positions(rollout, part)
    if against is not None:
        arrays["other"] = against[1] if part is None else packing.gather(part, against[1])
    found = {"values": values, "likeliest": zeros, "divergence": zeros}
    found |= _in_chunks(score, model, params, config, **arrays)
    # rounded as operands of the head are
    found["states"] = hidden.astype(model.dtype) if with_states else None
    return jax.tree.map(lambda x: _rows(x, rollout, part), ResponseLogprobs(**found))


def _rows(x: Array, rollout: Rollout, part: Part | None) -> Float[Array, "B T ..."]:
    """What was computed, as an array of all rows."""
    return x if part is None else packing.scatter(part, x, rollout.mask.shape)


def _positions(rollout: Rollout, part: Part | None) -> Int[Array, "B T"]:
    """The position in its response of each token that is computed."""
    shape = rollout.mask.shape
    if part is None:
        return jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return part.targets.reshape(part.response.shape) % shape[1]


def rollout_logprobs(
    model: Model,
    params: Params,
    rollout: Rollout,
    *,
    config: Config,
    group_size: int,
    axes: tuple[str | None, ...] = (),
    with_values: bool = False,
    with_states: bool = False,
) -> ResponseLogprobs:
    """`response_logprobs` without gradient, packed if the model packs. `group_size` and
    `axes` as in `packing.make_sum`.
    """
    options = {"config": config, "with_values": with_values, "with_states": with_states}
    total = packing.make_sum(model, config, rollout, rollout.mask, group_size=group_size, axes=axes)
    return total(lambda part: response_logprobs(model, params, rollout, part=part, **options))


def _is_likeliest(logits: Float[Array, "N V"], tokens: Int[Array, "N"]) -> Float[Array, "N"]:
    own = jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0]
    return (own >= logits.max(-1)).astype(jnp.float32)


def full_kl(
    model: Model,
    params: Params,
    reference: Params,
    rollout: Rollout,
    *,
    config: Config,
    divergence: Callable = kl.full,
    part: Part | None = None,
) -> Float[Array, "B T"]:
    """The divergence over the whole vocabulary in the state before each response token,
    after the temperature only. 0 where nothing was sampled. Logits are computed in
    chunks.

    Args:
      divergence: takes logits and reference logits [N V], returns [N].
      part: compute these packed rows alone.
    """

    def diverge(h, ref_h):
        tempered = (
            sampling.temper(model.logits(p, x), temperature=config.temperature)
            for p, x in ((params, h), (reference, ref_h))
        )
        return divergence(*tempered)

    hidden = states_before_tokens(model, params, rollout, part=part)
    ref_hidden = states_before_tokens(model, reference, rollout, part=part)
    value = _in_chunks(diverge, model, params, config, h=hidden, ref_h=ref_hidden)
    value = _rows(value, rollout, part)
    return jnp.where(rollout.mask > 0, value, 0.0)


def last_value(
    model: Model,
    params: Params,
    tokens: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    *,
    dropout_key=None,
) -> Float[Array, "B"]:
    """The value head's output at the last token of each text, without a context."""
    hidden, _ = model.apply(params, tokens, mask, dropout_key=dropout_key)
    slots = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    last = jnp.where(mask, slots, 0).max(1)
    return jnp.take_along_axis(model.value(params, hidden), last[:, None], 1)[:, 0]


def context(extra: PyTree) -> tuple[Array, Array] | None:
    """What the policy is conditioned on besides tokens, from `extra` of prompts or a
    rollout: (features of a recording Float[B F M], its number of frames Int[B]) or
    None.
    """
    return (extra["context"], extra["context_length"]) if "context" in extra else None


def states_before_tokens(
    model: Model, params: Params, rollout: Rollout, *, dropout_key=None, part: Part | None = None
) -> Float[Array, "B T D"]:
    """The hidden state one slot before each response token: the one that chose it."""
    if part is not None:
        hidden, _ = model.apply(
            params,
            part.tokens,
            part.attend,
            positions=part.positions,
            segments=part.segments,
            dropout_key=dropout_key,
        )
        return jnp.take_along_axis(hidden, part.reads[..., None], 1)
    hidden, _ = model.apply(
        params,
        rollout.tokens,
        rollout.attend,
        context=context(rollout.extra),
        dropout_key=dropout_key,
    )
    return hidden[:, -rollout.mask.shape[1] - 1 : -1]


def _in_chunks(fn, model, params, config, *, h, **arrays):
    """fn(h=rows, ...) for all rows of the arrays [B T ...], with at most `logits_bytes`
    of logits at a time on each device.
    """
    shape = h.shape[:2]
    rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in {"h": h, **arrays}.items()}
    local_rows = math.prod(shape) // layout.row_shards()
    chunks = number_of_chunks(local_rows, model.head(params).shape[0], config.logits_bytes)
    if chunks == 1:
        out = fn(**rows)
    else:
        # A chunk takes every `chunks`-th row, so that all devices work on each chunk.
        cut = lambda x: x.reshape(x.shape[0] // chunks, chunks, *x.shape[1:]).swapaxes(0, 1)
        with jax.named_scope("chunks"):
            out = jax.lax.map(lambda x: jax.checkpoint(fn)(**x), jax.tree.map(cut, rows))
        out = jax.tree.map(lambda x: x.swapaxes(0, 1), out)
    return jax.tree.map(lambda x: x.reshape(shape), out)


def number_of_chunks(rows: int, vocab: int, budget: int) -> int:
    """The smallest divisor of `rows` whose chunk of float32 logits fits the budget in
    bytes (at worst one row a chunk).

    >>> number_of_chunks(1536, 49152, 64 * 2**20)  # 288 MiB: 5 would do, 6 divides
    6
    """
    need = -(-rows * vocab * 4 // budget)
    return next((n for n in range(max(need, 1), rows) if rows % n == 0), max(rows, 1))
