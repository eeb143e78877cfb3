"""Policy losses that restrain the few tokens which drive the entropy down
(https://arxiv.org/abs/2505.22617). Conventions: `jaxppo.losses`.

cov = (A − mean A)(log π − mean log π), with means over the tokens of this call. Each
device and microbatch chooses its own tokens, so these are the only losses whose result
depends on how the batch is divided.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxppo import masked
from jaxppo.losses.shared import Key, Loss, finish, log_ratio
from jaxppo.losses.token import clipped_surrogate
from jaxppo.masked import Mask
from jaxppo.types import BT, Scalar


def kl_cov(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *,
           fraction: Scalar = 2e-3, coef: Scalar = 1.0, key: Key = None) -> Loss:  # fmt: skip
    """−r A without a clip, plus coef · |d| on the `fraction` of tokens (at least one)
    with the largest covariance (https://arxiv.org/abs/2505.22617).

    "covariance_fraction" counts those tokens.

    >>> lp, a = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[2.0, 0.0, -1.0]])
    >>> loss = kl_cov(lp, lp - 0.5, a, jnp.ones((1, 3)), coef=1.0)[0]
    >>> print(jax.device_get(loss).round(3))
    [[-2.797  0.     1.649]]
    """
    d, m = log_ratio(logprobs, old_logprobs, mask), mask.astype(bool)
    cov = jnp.where(m, _covariance(logprobs, advantages, mask), -jnp.inf)
    chosen = m & (_rank(-cov) < _number(fraction, m, d.dtype))
    # JAX's slope of |d| at 0 is 1. In the first minibatch all d are 0, and the penalty
    # must have no gradient.
    penalty = jnp.where(chosen & (d != 0), coef * jnp.abs(d), 0)
    per_token = -jnp.exp(d) * masked.keep(advantages, mask) + penalty
    return finish(per_token, d, mask, covariance_fraction=chosen)


def clip_cov(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *, low: Scalar = 0.2,
             high: Scalar = 0.2, fraction: Scalar = 2e-4, lower: Scalar = 1.0, upper: Scalar = 5.0,
             key: Key = None) -> Loss:  # fmt: skip
    """PPO's clip, and 0 on a random `fraction` of all tokens (at least one) with lower
    < cov < upper (https://arxiv.org/abs/2505.22617).

    Tokens that PPO clips are not drawn. "covariance_fraction" counts the drawn tokens.
    Raises ValueError without a key.

    >>> lp, a = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[2.0, 0.0, -1.0]])
    >>> key, ones = jax.random.key(0), jnp.ones((1, 3))
    >>> clip_cov(lp, lp, a, ones, lower=1.5, upper=2.0, key=key)[0]
    Array([[ 0., -0.,  1.]], dtype=float32)
    """
    if key is None:
        raise ValueError("clip_cov draws tokens at random: it needs a key")
    d, m = log_ratio(logprobs, old_logprobs, mask), mask.astype(bool)
    per_token, clipped = clipped_surrogate(jnp.exp(d), masked.keep(advantages, mask), low, high)
    cov = _covariance(logprobs, advantages, mask)
    candidates = m & (cov > lower) & (cov < upper) & ~clipped
    draw = jnp.where(candidates, jax.random.uniform(key, d.shape), 2.0)
    chosen = candidates & (_rank(draw) < _number(fraction, m, d.dtype))
    per_token = jnp.where(chosen, 0, per_token)
    return finish(per_token, d, mask, clip_fraction=clipped, covariance_fraction=chosen)


def _covariance(logprobs: Array, advantages: Array, mask: Array) -> Array:
    lp, a = lax.stop_gradient(masked.keep(logprobs, mask)), masked.keep(advantages, mask)
    return (a - masked.mean(a, mask)) * (lp - masked.mean(lp, mask))


def _rank(x: Array) -> Array:
    """The rank of each element, 0 for the smallest."""
    order = jnp.argsort(x.reshape(-1))
    # Strict promotion refuses the int64 that argsort gives with 64-bit floats on.
    return jnp.argsort(order).reshape(x.shape).astype(jnp.int32)


def _number(fraction: Scalar, m: Array, dtype) -> Array:
    """How many tokens a fraction of the mask is, at least one."""
    return jnp.maximum(jnp.floor(jnp.sum(m, dtype=dtype) * fraction), 1).astype(jnp.int32)
