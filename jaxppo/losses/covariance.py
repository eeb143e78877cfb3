"""Policy losses that hold back the few tokens which drive the entropy down
(https://arxiv.org/abs/2505.22617).

cov = (A − mean A)(log π − mean log π), means over the tokens of this call: with devices
or microbatches each chooses its own tokens, and these two losses alone depend on how
the batch is cut. Conventions: `jaxppo.losses`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxppo import masked
from jaxppo.losses.shared import Diagnostics, finish, log_ratio
from jaxppo.losses.token import clipped_surrogate
from jaxppo.masked import Mask
from jaxppo.types import Scalar


def kl_cov(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    fraction: Scalar = 2e-3,
    coef: Scalar = 1.0,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """−r A without a clip, plus coef · |d| on the `fraction` of tokens (at least one)
    with the largest covariance.

    From https://arxiv.org/abs/2505.22617. "covariance_fraction" counts those tokens.

    >>> import jax.numpy as jnp, numpy as np
    >>> lp, a = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[2.0, 0.0, -1.0]])
    >>> print(np.asarray(kl_cov(lp, lp - 0.5, a, jnp.ones((1, 3)), coef=1.0)[0]).round(3))
    [[-2.797  0.     1.649]]
    """
    d, m = log_ratio(logprobs, old_logprobs, mask), mask.astype(bool)
    cov = jnp.where(m, _covariance(logprobs, advantages, mask), -jnp.inf)
    chosen = m & (_rank(-cov) < _number(fraction, m, d.dtype))
    # JAX's slope of |d| at 0 is 1, and in the first minibatch all d are 0: there the
    # penalty must not pull.
    penalty = jnp.where(chosen & (d != 0), coef * jnp.abs(d), 0)
    return finish(
        -jnp.exp(d) * masked.keep(advantages, mask) + penalty, d, mask, covariance_fraction=chosen
    )


def clip_cov(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    low: Scalar = 0.2,
    high: Scalar = 0.2,
    fraction: Scalar = 2e-4,
    lower: Scalar = 1.0,
    upper: Scalar = 5.0,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """PPO's clip, and 0 on a `fraction` of all tokens (at least one), drawn from those
    with lower < cov < upper.

    From https://arxiv.org/abs/2505.22617. Tokens which PPO clips already are not drawn.
    "covariance_fraction" counts those that were drawn. Raises ValueError without a key.

    >>> import jax, jax.numpy as jnp
    >>> lp, a = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[2.0, 0.0, -1.0]])
    >>> clip_cov(lp, lp, a, jnp.ones((1, 3)), lower=1.5, upper=2.0, key=jax.random.key(0))[
    ...     0
    ... ]
    Array([[ 0., -0.,  1.]], dtype=float32)
    """
    if key is None:
        raise ValueError("clip_cov draws tokens at random and needs a key")
    d, m = log_ratio(logprobs, old_logprobs, mask), mask.astype(bool)
    per_token, clipped = clipped_surrogate(jnp.exp(d), masked.keep(advantages, mask), low, high)
    cov = _covariance(logprobs, advantages, mask)
    candidates = m & (cov > lower) & (cov < upper) & ~clipped
    lot = jnp.where(candidates, jax.random.uniform(key, d.shape), 2.0)
    chosen = candidates & (_rank(lot) < _number(fraction, m, d.dtype))
    per_token = jnp.where(chosen, 0, per_token)
    return finish(per_token, d, mask, clip_fraction=clipped, covariance_fraction=chosen)


def _covariance(logprobs: Array, advantages: Array, mask: Array) -> Array:
    logprobs, advantages = (
        lax.stop_gradient(masked.keep(logprobs, mask)),
        masked.keep(advantages, mask),
    )
    return (advantages - masked.mean(advantages, mask)) * (logprobs - masked.mean(logprobs, mask))


def _rank(x: Array) -> Array:
    """The place of each element when all are sorted, 0 for the smallest."""
    order = jnp.argsort(x.reshape(-1))
    return (
        jnp.argsort(order).reshape(x.shape).astype(jnp.int32)
    )  # strict about int64 with 64-bit floats on


def _number(fraction: Scalar, m: Array, dtype) -> Array:
    """How many tokens a fraction of the mask is, one at least."""
    return jnp.maximum(jnp.floor(jnp.sum(m, dtype=dtype) * fraction), 1).astype(jnp.int32)
