"""Terms beside the policy loss: the critic's loss and the entropy. Nothing is reduced.

The value losses need no mask: their weights are 0 at padding. Pass one if values or
returns there may be infinite.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo import masked
from jaxppo.masked import Mask
from jaxppo.types import Scalar


def value_mse(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], *, mask: Mask | None = None
) -> Float[Array, "B T"]:
    """Half the squared error: (V − R)² / 2 (https://arxiv.org/abs/1707.06347, section
    5).

    >>> import jax.numpy as jnp
    >>> value_mse(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]]))
    Array([[0.5, 2. ]], dtype=float32)
    """
    return jnp.square(_kept(values - returns, mask)) / 2


def value_clipped(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    *,
    eps: Scalar = 0.2,
    mask: Mask | None = None,
) -> Float[Array, "B T"]:
    """The worse of the errors of V and of V held near its old value: max((V − R)²,
    (clip(V, V_old ± ε) − R)²) / 2.

    From PPO's first implementation; see https://arxiv.org/abs/2005.12729.

    >>> import jax.numpy as jnp
    >>> value_clipped(
    ...     jnp.array([[1.0, 1.0]]),
    ...     jnp.array([[0.0, 0.0]]),
    ...     jnp.array([[2.0, 1.0]]),
    ...     eps=0.5,
    ... )
    Array([[1.125, 0.125]], dtype=float32)
    """
    values, old_values, returns = (_kept(x, mask) for x in (values, old_values, returns))
    held = jnp.clip(values, old_values - eps, old_values + eps)
    return jnp.maximum(jnp.square(values - returns), jnp.square(held - returns)) / 2


def value_huber(
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    *,
    delta: Scalar = 1.0,
    mask: Mask | None = None,
) -> Float[Array, "B T"]:
    """Quadratic near, linear far: e² / 2 where |e| ≤ δ, else δ (|e| − δ / 2), e = V − R
    (https://doi.org/10.1214/aoms/1177703732).

    >>> import jax.numpy as jnp
    >>> value_huber(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 0.0]]))
    Array([[0.5, 2.5]], dtype=float32)
    """
    size = jnp.abs(_kept(values - returns, mask))
    inside = size <= delta
    return jnp.where(
        inside,
        jnp.square(size) / 2,
        jnp.where(inside, 0, delta) * (size - jnp.where(inside, 0, delta) / 2),
    )


def entropy(logits: Float[Array, "*s V"]) -> Float[Array, "*s"]:
    """The entropy of softmax(logits), in nats: −Σᵥ π(v) log π(v)
    (https://arxiv.org/abs/1602.01783).

    A logit of −inf adds nothing.

    >>> import jax.numpy as jnp, numpy as np
    >>> print(np.asarray(entropy(jnp.array([[0.0, 0.0], [0.0, -jnp.inf]]))).round(3))
    [0.693 0.   ]
    """
    logprobs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logprobs) * jnp.where(logits > -jnp.inf, -logprobs, 0), axis=-1)


def _kept(x: Array, mask: Array | None) -> Array:
    return x if mask is None else masked.keep(x, mask)
