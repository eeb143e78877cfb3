"""What a model says of a response. The shift by one and the temperature live here and nowhere else.

Token t of a response (slot P + t of the row) is chosen in the state before it: by the logits of slot P + t − 1, and that
state's value is the value of time t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxppo import kernels, sampling
from jaxppo.config import Config
from jaxppo.types import Model, Params, Rollout

FLOOR = -20.0  # log-prob given to a token that fell outside the keep-set of new parameters


class Scores(NamedTuple):
    """A response under one set of parameters; each [B T]."""

    logprobs: Float[Array, "B T"]  # all processors: for ratios
    raw_logprobs: Float[Array, "B T"]  # temperature only: for KL
    entropy: Float[Array, "B T"]  # nats, temperature only
    values: Float[Array, "B T"]


def cast(params: Params, dtype) -> Params:
    """Matrices rounded to the compute dtype, once, outside a decode loop; vectors (norms, biases) stay as they are.

    >>> import jax.numpy as jnp
    >>> {k: x.dtype.name for k, x in cast({"b": jnp.ones(2), "w": jnp.ones((2, 2))}, jnp.bfloat16).items()}
    {'b': 'float32', 'w': 'bfloat16'}
    """

    def rounded(path, x):
        exact = path[0].key == "value"  # the value head is tiny and its products are float32
        return x if exact or x.ndim < 2 else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(rounded, dict(params))


def choices(
    logits: Float[Array, "N V"], tokens: Int[Array, "N"], *, config: Config
) -> tuple[Float[Array, "N"], Float[Array, "N"], Float[Array, "N"]]:
    """(log-prob with all processors, log-prob with the temperature only, entropy) of one token a row."""
    logits = sampling.temper(logits, temperature=config.temperature)
    raw, entropy = kernels.token_logprobs(logits, tokens)
    if not has_keep_set(config):
        return raw, raw, entropy
    kept = sampling.keep_set(logits, top_k=config.top_k, top_p=config.top_p)
    inside = jnp.take_along_axis(kept, tokens[:, None], 1)[:, 0] > -jnp.inf
    # A token may leave the keep-set while the epochs run: floored, and without gradient.
    logprob = jnp.where(inside, raw - jnp.where(inside, _log_kept(logits, kept), 0.0), FLOOR)
    return logprob, raw, entropy


def has_keep_set(config: Config) -> bool:
    return config.top_k > 0 or not (isinstance(config.top_p, float | int) and config.top_p >= 1)


def _log_kept(logits, kept):
    """log of the probability inside the keep-set."""
    return jax.nn.logsumexp(kept, -1) - jax.nn.logsumexp(logits, -1)


def score(
    model: Model, params: Params, rollout: Rollout, *, config: Config, with_values: bool = True, dropout_key=None
) -> Scores:
    """Log-probs, entropy and values of a rollout's responses under `params`. Only response positions get logits, and logits of
    more than `config.logits_bytes` are computed in chunks (and again in the backward pass)."""
    length = rollout.mask.shape[1]
    hidden, _ = model.apply(params, rollout.tokens, rollout.attend, dropout_key=dropout_key)
    hidden = hidden[:, -length - 1 : -1]
    values = model.value(params, hidden) if with_values else jnp.zeros(rollout.mask.shape, jnp.float32)
    logprobs, raw, entropy = _by_chunks(model, params, hidden, rollout.response, config)
    return Scores(logprobs, raw, entropy, values)


def _by_chunks(model, params, hidden, tokens, config):
    shape = tokens.shape
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = tokens.reshape(-1)
    one = lambda h, t: choices(model.logits(params, h), t, config=config)
    vocab = model.head(params).shape[0]
    chunks = number_of_chunks(flat.size, vocab, config.logits_bytes)
    if chunks == 1:
        out = one(rows, flat)
    else:
        cut = lambda x: x.reshape(chunks, x.shape[0] // chunks, *x.shape[1:])
        out = jax.lax.map(lambda ht: jax.checkpoint(one)(*ht), (cut(rows), cut(flat)))
    return tuple(x.reshape(shape) for x in out)


def number_of_chunks(rows: int, vocab: int, budget: int) -> int:
    """The smallest divisor of `rows` whose chunk of float32 logits fits the budget (one row a chunk at worst).

    >>> number_of_chunks(1536, 49152, 64 * 2**20)  # 288 MiB of logits: 5 would do, 6 divides
    6
    """
    need = -(-rows * vocab * 4 // budget)
    return next((n for n in range(max(need, 1), rows) if rows % n == 0), max(rows, 1))
