"""Policy losses on whole sequences. The value is repeated on every token of the row.
The advantage of a row is the masked mean of its tokens'. Conventions: `jaxppo.losses`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import masked
from jaxppo.losses.shared import CLAMP, Key, Loss, finish, log_ratio
from jaxppo.losses.token import clipped_surrogate
from jaxppo.masked import Mask
from jaxppo.types import BT, Scalar


def gspo(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *,
         low: Scalar = 3e-4, high: Scalar = 4e-4, key: Key = None) -> Loss:  # fmt: skip
    """Group sequence policy optimisation: −min(s A, clip(s, 1 − low, 1 + high) A), s =
    exp(meanₜ d) (https://arxiv.org/abs/2507.18071).

    >>> lp, m = jnp.array([[0.3, -0.1, 7.0]]), jnp.array([[1.0, 1.0, 0.0]])
    >>> loss = gspo(lp, 0 * lp, jnp.ones((1, 3)), m, low=0.2, high=0.2)[0]
    >>> print(jax.device_get(loss).round(3))
    [[-1.105 -1.105  0.   ]]
    """
    ratio, a = _sequence_ratio(logprobs, old_logprobs, mask), _row_mean(advantages, mask)
    per_token, clipped = clipped_surrogate(ratio, a, low, high)
    return finish(per_token, log_ratio(logprobs, old_logprobs, mask), mask, clip_fraction=clipped)


def gspo_token(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *,
               low: Scalar = 3e-4, high: Scalar = 4e-4, key: Key = None) -> Loss:  # fmt: skip
    """GSPO with one advantage for each token: sₜ = sg(s) π / sg(π) replaces s
    (https://arxiv.org/abs/2507.18071).

    If all tokens of a row have the same advantage, value and gradient under
    `aggregate.sequence_mean` are those of `gspo`.

    >>> lp, m = jnp.array([[0.3, -0.1, 7.0]]), jnp.array([[1.0, 1.0, 0.0]])
    >>> a = jnp.array([[1.0, 2.0, 0.0]])
    >>> loss = gspo_token(lp, 0 * lp, a, m, low=0.2, high=0.2)[0]
    >>> print(jax.device_get(loss).round(3))
    [[-1.105 -2.21   0.   ]]
    """
    lp = masked.keep(logprobs, mask)
    sequence_ratio = jax.lax.stop_gradient(_sequence_ratio(logprobs, old_logprobs, mask))
    ratio = sequence_ratio * jnp.exp(lp - jax.lax.stop_gradient(lp))
    per_token, clipped = clipped_surrogate(ratio, masked.keep(advantages, mask), low, high)
    return finish(per_token, log_ratio(logprobs, old_logprobs, mask), mask, clip_fraction=clipped)


def gmpo(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *,
         low: Scalar = 0.4, high: Scalar = 0.4, key: Key = None) -> Loss:  # fmt: skip
    """The geometric mean of clipped ratios: −A exp(meanₜ d̃)
    (https://arxiv.org/abs/2507.20673).

    d̃ = min(d, clip(d, −low, high)) where A ≥ 0, the max of the two where A < 0. The
    bounds are on d, not on the ratio.

    >>> lp, m = jnp.array([[0.8, -0.2, 7.0]]), jnp.array([[1.0, 1.0, 0.0]])
    >>> print(jax.device_get(gmpo(lp, 0 * lp, jnp.ones((1, 3)), m)[0]).round(3))
    [[-1.105 -1.105  0.   ]]
    """
    d, a = log_ratio(logprobs, old_logprobs, mask), _row_mean(advantages, mask)
    outside = jnp.where(a < 0, d < -low, d > high)
    ratio = jnp.exp(_row_mean(jnp.where(outside, jnp.clip(d, -low, high), d), mask))
    return finish(-a * ratio, d, mask, clip_fraction=outside)


def _row_mean(x: Array, mask: Array) -> Array:
    """The masked mean of each row, repeated on its tokens."""
    return jnp.broadcast_to(masked.mean(x, mask, axis=-1)[:, None], x.shape)


def _sequence_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
    return jnp.exp(jnp.clip(_row_mean(logprobs - old_logprobs, mask), -CLAMP, CLAMP))
