"""The critic's loss and the entropy, before any reduction.

The weights of value losses are 0 at padding. Pass a mask if values or returns may be
infinite there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo import masked
from jaxppo.masked import Mask
from jaxppo.types import BT, Scalar


def value_mse(values: BT, returns: BT, *, mask: Mask | None = None) -> BT:
    """Half the squared error: (V − R)² / 2 (https://arxiv.org/abs/1707.06347, section
    5).

    >>> value_mse(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]]))
    Array([[0.5, 2. ]], dtype=float32)
    """
    return jnp.square(_keep(values - returns, mask)) / 2


def value_clipped(
    values: BT, old_values: BT, returns: BT, *, eps: Scalar = 0.2, mask: Mask | None = None
) -> BT:
    """The larger error of V and of V clipped near its old value: max((V − R)², (clip(V,
    V_old ± ε) − R)²) / 2.

    From PPO's first implementation; see https://arxiv.org/abs/2005.12729.

    >>> values, old, returns = jnp.array([[[1.0, 1.0]], [[0.0, 0.0]], [[2.0, 1.0]]])
    >>> value_clipped(values, old, returns, eps=0.5)
    Array([[1.125, 0.125]], dtype=float32)
    """
    values, old_values, returns = (_keep(x, mask) for x in (values, old_values, returns))
    held = jnp.clip(values, old_values - eps, old_values + eps)
    return jnp.maximum(jnp.square(values - returns), jnp.square(held - returns)) / 2


def value_huber(values: BT, returns: BT, *, delta: Scalar = 1.0, mask: Mask | None = None) -> BT:
    """Quadratic near 0, linear beyond δ: e² / 2 where |e| ≤ δ, else δ (|e| − δ / 2), e
    = V − R (https://doi.org/10.1214/aoms/1177703732).

    >>> value_huber(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 0.0]]))
    Array([[0.5, 2.5]], dtype=float32)
    """
    size = jnp.abs(_keep(values - returns, mask))
    inside = size <= delta
    slope = jnp.where(inside, 0, delta)  # an infinite delta would make a NaN gradient
    return jnp.where(inside, jnp.square(size) / 2, slope * (size - slope / 2))


def entropy(logits: Float[Array, "*s V"]) -> Float[Array, "*s"]:
    """The entropy of softmax(logits), in nats: −Σᵥ π(v) log π(v)
    (https://arxiv.org/abs/1602.01783).

    Tokens with a logit of −inf contribute 0.

    >>> h = entropy(jnp.array([[0.0, 0.0], [0.0, -jnp.inf]]))
    >>> print(jax.device_get(h).round(3))
    [0.693 0.   ]
    """
    logprobs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logprobs) * jnp.where(logits > -jnp.inf, -logprobs, 0), axis=-1)


def _keep(x: Array, mask: Array | None) -> Array:
    return x if mask is None else masked.keep(x, mask)
