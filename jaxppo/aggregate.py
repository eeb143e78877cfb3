"""How per-token losses become one number: weights [B T], with which the loss is Σ
weights · per_token.

The choice decides how much a token of a long response counts, and is where
implementations disagree without a word (https://arxiv.org/abs/2503.20783). The
denominators are those of the whole batch (over `axis_name`), so weighted sums of
microbatches and devices add up to the loss of the batch: nothing is averaged
afterwards. Rows without tokens do not count. A batch without any tokens has weights 0.
The weights have the dtype of the mask, or for a boolean mask JAX's default float.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo import masked
from jaxppo.masked import AxisName, Mask
from jaxppo.types import Scalar


def token_mean(mask: Mask, *, axis_name: AxisName = None) -> Float[Array, "B T"]:
    """Every token alike: mᵢₜ / Σ m (https://arxiv.org/abs/2503.14476).

    >>> import jax.numpy as jnp
    >>> token_mean(jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
    Array([[0.25, 0.25, 0.25],
           [0.25, 0.  , 0.  ]], dtype=float32)
    """
    m = _float(mask)
    return m / jnp.maximum(masked.total(m, m, axis_name=axis_name), 1)


def token_sum(mask: Mask, *, axis_name: AxisName = None) -> Float[Array, "B T"]:
    """The sum over all tokens: wᵢₜ = mᵢₜ.

    >>> import jax.numpy as jnp
    >>> token_sum(jnp.array([[True, True, False]]))
    Array([[1., 1., 0.]], dtype=float32)
    """
    return _float(mask)


def sequence_mean(mask: Mask, *, axis_name: AxisName = None) -> Float[Array, "B T"]:
    """Every sequence alike, the mean of its tokens: mᵢₜ / (nᵢ · rows with tokens)
    (https://arxiv.org/abs/2402.03300).

    >>> import jax.numpy as jnp
    >>> sequence_mean(jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    Array([[0.25, 0.25],
           [0.5 , 0.  ],
           [0.  , 0.  ]], dtype=float32)
    """
    m = _float(mask)
    return sequence_sum(m, axis_name=axis_name) / jnp.maximum(jnp.sum(m, axis=-1, keepdims=True), 1)


def sequence_sum(mask: Mask, *, axis_name: AxisName = None) -> Float[Array, "B T"]:
    """The sum of a sequence's tokens, mean over sequences: mᵢₜ / rows with tokens
    (https://arxiv.org/abs/2402.14740).

    >>> import jax.numpy as jnp
    >>> sequence_sum(jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    Array([[0.5, 0.5],
           [0.5, 0. ],
           [0. , 0. ]], dtype=float32)
    """
    m = _float(mask)
    row = jnp.max(m, axis=-1, initial=0)
    return m / jnp.maximum(masked.total(row, row, axis_name=axis_name), 1)


def constant(
    mask: Mask, *, length: Scalar | int, axis_name: AxisName = None
) -> Float[Array, "B T"]:
    """The sum of a sequence's tokens over a constant: mᵢₜ / (length · rows with tokens)
    (https://arxiv.org/abs/2503.20783).

    Unlike `sequence_mean` a long wrong answer is not punished less for each of its
    tokens.

    >>> import jax.numpy as jnp
    >>> constant(jnp.array([[1.0, 1.0], [1.0, 0.0]]), length=4)
    Array([[0.125, 0.125],
           [0.125, 0.   ]], dtype=float32)
    """
    return sequence_sum(mask, axis_name=axis_name) / length


def _float(mask: Array) -> Array:
    """0 and 1 in the mask's own dtype, if it is a float."""
    dtype = mask.dtype if jnp.issubdtype(mask.dtype, jnp.floating) else jnp.result_type(float)
    return mask.astype(bool).astype(dtype)
