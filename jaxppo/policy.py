"""What a model says of a response. The shift by one and the temperature live here and
nowhere else.

Token t of a response (slot P + t of the row) is chosen in the state before it: by the
logits of slot P + t − 1, and that state's value is the value of time t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxppo import kernels, kl, sampling
from jaxppo.config import Config
from jaxppo.models import layout
from jaxppo.types import Model, Params, PyTree, Rollout

# log-prob given to a token that fell outside the keep-set of new parameters
FLOOR = -20.0


class TokenLogprobs(NamedTuple):
    """A response under one set of parameters; each [B T]."""

    logprobs: Float[Array, "B T"]  # all processors: for ratios
    raw_logprobs: Float[Array, "B T"]  # temperature only: for KL
    entropy: Float[Array, "B T"]  # nats, temperature only
    values: Float[Array, "B T"]
    likeliest: Float[
        Array, "B T"
    ]  # 1 where no token is likelier; 0 everywhere unless it was asked for


def cast(params: Params, dtype) -> Params:
    """Matrices rounded to the compute dtype, once, outside a decode loop; vectors
    (norms, biases) stay as they are.

    >>> import jax.numpy as jnp
    >>> {
    ...     k: x.dtype.name
    ...     for k, x in cast(
    ...         {"b": jnp.ones(2), "w": jnp.ones((2, 2))}, jnp.bfloat16
    ...     ).items()
    ... }
    {'b': 'float32', 'w': 'bfloat16'}
    """

    def rounded(path, x):
        names = [part.key for part in path]
        exact = "value" in names  # the value head is tiny and its products are float32
        return (
            x if exact or x.ndim - ("layers" in names) < 2 else x.astype(dtype)
        )  # scanned layers have one dimension more

    return jax.tree_util.tree_map_with_path(rounded, dict(params))


def choices(
    logits: Float[Array, "N V"],
    tokens: Int[Array, "N"],
    *,
    config: Config,
    guide: Float[Array, "N V"] | None = None,
) -> tuple[Float[Array, "N"], Float[Array, "N"], Float[Array, "N"]]:
    """(log-prob with all processors, log-prob with the temperature only, entropy) of
    one token a row; `guide` as in `sampling.process`.
    """
    logits = sampling.temper(logits, temperature=config.temperature)
    raw, entropy = kernels.token_logprobs(logits, tokens)
    if guide is None and not sampling.has_keep_set(config):
        return raw, raw, entropy
    kept = sampling.process(logits, sample=config, guide=guide)
    inside = jnp.take_along_axis(kept, tokens[:, None], 1)[:, 0] > -jnp.inf
    # RL4LMs, where NLPO comes from, leaves the log-prob of an allowed token as it is
    # without the mask.
    inside_mass = (
        _log_kept(logits, kept) if guide is None or config.mask_renormalise else jnp.zeros_like(raw)
    )
    # A token may leave the keep-set while the epochs run: floored, and without
    # gradient.
    logprob = jnp.where(inside, raw - jnp.where(inside, inside_mass, 0.0), FLOOR)
    return logprob, raw, entropy


def _log_kept(logits, kept):
    """log of the probability inside the keep-set."""
    return jax.nn.logsumexp(kept, -1) - jax.nn.logsumexp(logits, -1)


def token_logprobs(
    model: Model,
    params: Params,
    rollout: Rollout,
    *,
    config: Config,
    with_values: bool = True,
    with_likeliest: bool = False,
    guide: Params | None = None,
    dropout_key=None,
) -> TokenLogprobs:
    """Log-probs, entropy and values of a rollout's responses under `params`. Only
    response positions get logits, and logits of more than `config.logits_bytes` are
    computed in chunks (and again in the backward pass). `guide` holds the parameters of
    NLPO's lagged policy.
    """
    hidden = before_tokens(model, params, rollout, dropout_key=dropout_key)
    values = (
        model.value(params, hidden) if with_values else jnp.zeros(rollout.mask.shape, jnp.float32)
    )
    likeliest = jnp.zeros(rollout.mask.shape, jnp.float32)
    if guide is None and with_likeliest:
        both = lambda x, t: (*choices(x, t, config=config), _likeliest(x, t))
        one = lambda h, t: both(model.logits(params, h), t)
        logprobs, raw, entropy, likeliest = _by_chunks(
            one, model, params, config, hidden, rollout.response
        )
    elif guide is None:
        one = lambda h, t: choices(model.logits(params, h), t, config=config)
        logprobs, raw, entropy = _by_chunks(one, model, params, config, hidden, rollout.response)
    else:
        older = before_tokens(model, guide, rollout)
        guided = lambda h, t, o: choices(
            model.logits(params, h), t, config=config, guide=model.logits(guide, o)
        )
        logprobs, raw, entropy = _by_chunks(
            guided, model, params, config, hidden, rollout.response, older
        )
    return TokenLogprobs(logprobs, raw, entropy, values, likeliest)


def _likeliest(logits: Float[Array, "N V"], tokens: Int[Array, "N"]) -> Float[Array, "N"]:
    """1 where no other token is likelier than the one that is there."""
    own = jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0]
    return (own >= logits.max(-1)).astype(jnp.float32)


def full_kl(
    model: Model, params: Params, reference: Params, rollout: Rollout, *, config: Config
) -> Float[Array, "B T"]:
    """KL(params ‖ reference) over the whole vocabulary in the state before each token
    of the response, with the temperature only; in chunks as in `score`. 0 where nothing
    was sampled.
    """

    def one(h, r):
        tempered = (
            sampling.temper(model.logits(p, x), temperature=config.temperature)
            for p, x in ((params, h), (reference, r))
        )
        return kl.full(*tempered)

    hidden, other = before_tokens(model, params, rollout), before_tokens(model, reference, rollout)
    return jnp.where(rollout.mask > 0, _by_chunks(one, model, params, config, hidden, other), 0.0)


def context(extra: PyTree) -> tuple[Array, Array] | None:
    """What a policy reads beside the tokens, from the `extra` of prompts or a rollout:
    (features of a recording Float[B F M], how many of its frames are real Int[B]), or
    None where there is none.
    """
    return (extra["context"], extra["context_length"]) if "context" in extra else None


def before_tokens(
    model: Model, params: Params, rollout: Rollout, *, dropout_key=None
) -> Float[Array, "B T D"]:
    """The hidden states in which the response's tokens were chosen: each stands one
    slot before its token.
    """
    heard = context(rollout.extra)
    hidden, _ = model.apply(
        params, rollout.tokens, rollout.attend, context=heard, dropout_key=dropout_key
    )
    return hidden[:, -rollout.mask.shape[1] - 1 : -1]


def _by_chunks(one, model, params, config, *arrays):
    """one(*rows) for all rows [B T ...] of the arrays, at most `logits_bytes` of logits
    at a time on each device.
    """
    shape = arrays[0].shape[:2]
    rows = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    chunks = number_of_chunks(
        rows[0].shape[0] // layout.shares(), model.head(params).shape[0], config.logits_bytes
    )
    if chunks == 1:
        out = one(*rows)
    else:
        # Each chunk takes every so many rows: a part of every device's own, where a
        # block of rows would be one device's alone.
        cut = lambda x: x.reshape(x.shape[0] // chunks, chunks, *x.shape[1:]).swapaxes(0, 1)
        with jax.named_scope("chunks"):
            out = jax.lax.map(
                lambda parts: jax.checkpoint(one)(*parts), tuple(cut(x) for x in rows)
            )
        out = jax.tree.map(lambda x: x.swapaxes(0, 1), out)
    return jax.tree.map(lambda x: x.reshape(shape), out)


def number_of_chunks(rows: int, vocab: int, budget: int) -> int:
    """The smallest divisor of `rows` whose chunk of float32 logits fits the budget (one
    row a chunk at worst).

    >>> number_of_chunks(
    ...     1536, 49152, 64 * 2**20
    ... )  # 288 MiB of logits: 5 would do, 6 divides
    6
    """
    need = -(-rows * vocab * 4 // budget)
    return next((n for n in range(max(need, 1), rows) if rows % n == 0), max(rows, 1))


def last_value(
    model: Model,
    params: Params,
    tokens: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    *,
    dropout_key=None,
) -> Float[Array, "B"]:
    """The value head's number at the last token of each text. The model reads text
    alone: no context is passed on to it.
    """
    hidden, _ = model.apply(params, tokens, mask, dropout_key=dropout_key)
    slots = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    last = jnp.where(mask, slots, 0).max(1)
    return jnp.take_along_axis(model.value(params, hidden), last[:, None], 1)[:, 0]
