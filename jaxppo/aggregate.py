"""Weights [B T] that reduce per-token losses to one: loss = Σ weights · per_token.

The choice decides how much a token of a long response counts
(https://arxiv.org/abs/2503.20783). The denominators are those of the whole batch (over
`axis_name`), so weighted sums of microbatches and devices add up to the loss of the
batch: never average them afterwards. Rows without tokens do not count. A batch without
tokens has weights 0. The dtype is that of the mask, or JAX's default float for a
boolean mask.
"""

import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import masked
from jaxppo.masked import AxisName, Mask
from jaxppo.types import BT, Scalar


def token_mean(mask: Mask, *, axis_name: AxisName = None) -> BT:
    """Mean over all tokens: mᵢₜ / Σ m (https://arxiv.org/abs/2503.14476).

    >>> token_mean(jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
    Array([[0.25, 0.25, 0.25],
           [0.25, 0.  , 0.  ]], dtype=float32)
    """
    m = _float(mask)
    return m / jnp.maximum(masked.total(m, m, axis_name=axis_name), 1)


def token_sum(mask: Mask, *, axis_name: AxisName = None) -> BT:
    """Sum over all tokens: wᵢₜ = mᵢₜ.

    >>> token_sum(jnp.array([[True, True, False]]))
    Array([[1., 1., 0.]], dtype=float32)
    """
    return _float(mask)


def sequence_mean(mask: Mask, *, axis_name: AxisName = None) -> BT:
    """Mean over sequences of the mean over their tokens: mᵢₜ / (nᵢ · rows with tokens)
    (https://arxiv.org/abs/2402.03300).

    >>> sequence_mean(jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    Array([[0.25, 0.25],
           [0.5 , 0.  ],
           [0.  , 0.  ]], dtype=float32)
    """
    m = _float(mask)
    return sequence_sum(m, axis_name=axis_name) / jnp.maximum(jnp.sum(m, axis=-1, keepdims=True), 1)


def sequence_sum(mask: Mask, *, axis_name: AxisName = None) -> BT:
    """Mean over sequences of the sum over their tokens: mᵢₜ / rows with tokens
    (https://arxiv.org/abs/2402.14740).

    >>> sequence_sum(jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    Array([[0.5, 0.5],
           [0.5, 0. ],
           [0. , 0. ]], dtype=float32)
    """
    m = _float(mask)
    row = jnp.max(m, axis=-1, initial=0)
    return m / jnp.maximum(masked.total(row, row, axis_name=axis_name), 1)


def constant(mask: Mask, *, length: Scalar, axis_name: AxisName = None) -> BT:
    """`sequence_sum` over a constant: mᵢₜ / (length · rows with tokens)
    (https://arxiv.org/abs/2503.20783).

    Unlike `sequence_mean`, it does not penalise the tokens of a long wrong answer less.

    >>> constant(jnp.array([[1.0, 1.0], [1.0, 0.0]]), length=4)
    Array([[0.125, 0.125],
           [0.125, 0.   ]], dtype=float32)
    """
    return sequence_sum(mask, axis_name=axis_name) / length


def _float(mask: Array) -> Array:
    """0 and 1 in the mask's own dtype, or the default float for a boolean mask."""
    dtype = mask.dtype if jnp.issubdtype(mask.dtype, jnp.floating) else jnp.result_type(float)
    return mask.astype(bool).astype(dtype)
