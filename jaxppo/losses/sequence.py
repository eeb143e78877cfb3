"""Policy losses on whole sequences; the value is repeated on every token of the row.
Conventions: `jaxppo.losses`.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxppo import masked
from jaxppo.losses.shared import CLAMP, Diagnostics, finish, log_ratio
from jaxppo.losses.token import clipped_surrogate
from jaxppo.masked import Mask
from jaxppo.types import Scalar


def gspo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    low: Scalar = 3e-4,
    high: Scalar = 4e-4,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """Group sequence policy optimisation: −min(s A, clip(s, 1 − low, 1 + high) A), s =
    exp(meanₜ d).

    From https://arxiv.org/abs/2507.18071.

    >>> import jax.numpy as jnp, numpy as np
    >>> lp, a, m = (
    ...     jnp.array([[0.3, -0.1, 7.0]]),
    ...     jnp.ones((1, 3)),
    ...     jnp.array([[1.0, 1.0, 0.0]]),
    ... )
    >>> print(np.asarray(gspo(lp, jnp.zeros((1, 3)), a, m, low=0.2, high=0.2)[0]).round(3))
    [[-1.105 -1.105  0.   ]]
    """
    ratio, a = _sequence_ratio(logprobs, old_logprobs, mask), _rows(advantages, mask)
    per_token, clipped = clipped_surrogate(ratio, a, low, high)
    return finish(per_token, log_ratio(logprobs, old_logprobs, mask), mask, clip_fraction=clipped)


def gspo_token(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    low: Scalar = 3e-4,
    high: Scalar = 4e-4,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """GSPO with an advantage for each token: sₜ = sg(s) π / sg(π) in place of s
    (https://arxiv.org/abs/2507.18071).

    With one advantage for the row, value and gradient under `aggregate.sequence_mean`
    are those of `gspo`.

    >>> import jax.numpy as jnp, numpy as np
    >>> lp, a, m = (
    ...     jnp.array([[0.3, -0.1, 7.0]]),
    ...     jnp.array([[1.0, 2.0, 0.0]]),
    ...     jnp.array([[1.0, 1.0, 0.0]]),
    ... )
    >>> print(
    ...     np.asarray(gspo_token(lp, jnp.zeros((1, 3)), a, m, low=0.2, high=0.2)[0]).round(
    ...         3
    ...     )
    ... )
    [[-1.105 -2.21   0.   ]]
    """
    d, lp = log_ratio(logprobs, old_logprobs, mask), masked.keep(logprobs, mask)
    ratio = lax.stop_gradient(_sequence_ratio(logprobs, old_logprobs, mask)) * jnp.exp(
        lp - lax.stop_gradient(lp)
    )
    per_token, clipped = clipped_surrogate(ratio, masked.keep(advantages, mask), low, high)
    return finish(per_token, d, mask, clip_fraction=clipped)


def gmpo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    low: Scalar = 0.4,
    high: Scalar = 0.4,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """The geometric mean of clipped ratios: −A exp(meanₜ d̃)
    (https://arxiv.org/abs/2507.20673).

    d̃ = min(d, clip(d, −low, high)) where A ≥ 0, max of the two where A < 0. The bounds
    are on d, not on the ratio.

    >>> import jax.numpy as jnp, numpy as np
    >>> lp, a, m = (
    ...     jnp.array([[0.8, -0.2, 7.0]]),
    ...     jnp.ones((1, 3)),
    ...     jnp.array([[1.0, 1.0, 0.0]]),
    ... )
    >>> print(np.asarray(gmpo(lp, jnp.zeros((1, 3)), a, m)[0]).round(3))
    [[-1.105 -1.105  0.   ]]
    """
    d, a = log_ratio(logprobs, old_logprobs, mask), _rows(advantages, mask)
    outside = jnp.where(a < 0, d < -low, d > high)
    held = jnp.where(outside, jnp.clip(d, -low, high), d)
    ratio = jnp.exp(_rows(held, mask))
    return finish(-a * ratio, d, mask, clip_fraction=outside)


def _rows(x: Array, mask: Array) -> Array:
    """The masked mean of each row on each of its tokens."""
    return jnp.broadcast_to(masked.mean(x, mask, axis=-1)[:, None], x.shape)


def _sequence_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
    return jnp.exp(jnp.clip(_rows(logprobs - old_logprobs, mask), -CLAMP, CLAMP))
