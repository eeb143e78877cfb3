"""Policy losses on whole sequences. The value is repeated on every token of the row.
The advantage of a row is the masked mean of its tokens'. Conventions: `jaxppo.losses`.
"""

from collections.abc import Callable

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

    Under `aggregate.sequence_sum` it is LUSPO, which does not make the tokens of long
    responses count less (https://arxiv.org/abs/2602.05261).

    >>> lp, m = jnp.array([[0.3, -0.1, 7.0]]), jnp.array([[1.0, 1.0, 0.0]])
    >>> loss = gspo(lp, 0 * lp, jnp.ones((1, 3)), m, low=0.2, high=0.2)[0]
    >>> print(jax.device_get(loss).round(3))
    [[-1.105 -1.105  0.   ]]
    """
    ratio = _sequence_ratio(logprobs, old_logprobs, mask)
    return _clipped(ratio, logprobs, old_logprobs, advantages, mask, low, high)


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


def rloo_clip(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *,
              low: Scalar = 0.2, high: Scalar = 0.2, key: Key = None) -> Loss:  # fmt: skip
    """`gspo` with the ratio of the whole sequence: −min(w A, clip(w, 1 − low, 1 + high)
    A), w = Πₜ r = exp(Σₜ d).

    RLOO (https://arxiv.org/abs/2402.14740) with PPO's clip, as TRL has it. Without
    bounds and under `aggregate.sequence_mean` the gradient is exact for old samples,
    too; a long response leaves the bounds after a small change of each token.

    >>> lp, m = jnp.array([[0.3, -0.1, 7.0]]), jnp.array([[1.0, 1.0, 0.0]])
    >>> loss = rloo_clip(lp, 0 * lp, -jnp.ones((1, 3)), m)[0]
    >>> print(jax.device_get(loss).round(3))
    [[1.221 1.221 0.   ]]
    """
    ratio = _sequence_ratio(logprobs, old_logprobs, mask, masked.total)
    return _clipped(ratio, logprobs, old_logprobs, advantages, mask, low, high)


def vespo(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *,
          k_positive: Scalar = 2.0, lambda_positive: Scalar = 3.0, k_negative: Scalar = 3.0,
          lambda_negative: Scalar = 2.0, key: Key = None) -> Loss:  # fmt: skip
    """A soft weight of the whole sequence instead of a clip: −sg(φ) A log π, φ = Wᵏ
    exp(λ (1 − W)), W = exp(Σₜ d) (https://arxiv.org/abs/2602.10693).

    k and λ are those of positive advantages where A ≥ 0. φ is 1 on policy and largest
    at W = k / λ. The paper aggregates with `aggregate.token_mean`.

    >>> lp, m = jnp.array([[-0.5, -1.0, 7.0]]), jnp.array([[1.0, 1.0, 0.0]])
    >>> loss = vespo(lp, lp - jnp.log(2.0) / 2, jnp.ones((1, 3)), m)[0]
    >>> print(jax.device_get(loss).round(3))  # W = 2: φ = 4 exp(−3)
    [[0.1   0.199 0.   ]]
    """
    ratio = jax.lax.stop_gradient(_sequence_ratio(logprobs, old_logprobs, mask, masked.total))
    a = masked.keep(advantages, mask)
    choose = lambda *x: jnp.where(a >= 0, *(jnp.asarray(y, a.dtype) for y in x))
    k, lam = choose(k_positive, k_negative), choose(lambda_positive, lambda_negative)
    weight = jnp.exp(k * jnp.log(ratio) + lam * (1 - ratio))
    per_token = -weight * a * masked.keep(logprobs, mask)
    return finish(per_token, log_ratio(logprobs, old_logprobs, mask), mask)


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
    d, a = log_ratio(logprobs, old_logprobs, mask), _on_row(advantages, mask)
    outside = jnp.where(a < 0, d < -low, d > high)
    ratio = jnp.exp(_on_row(jnp.where(outside, jnp.clip(d, -low, high), d), mask))
    return finish(-a * ratio, d, mask, clip_fraction=outside)


def _on_row(x: Array, mask: Array, reduce: Callable = masked.mean) -> Array:
    """The masked mean (or total) of each row, repeated on its tokens."""
    return jnp.broadcast_to(reduce(x, mask, axis=-1)[:, None], x.shape)


def _sequence_ratio(logprobs, old_logprobs, mask, reduce: Callable = masked.mean) -> Array:
    d = _on_row(logprobs - old_logprobs, mask, reduce)
    return jnp.exp(jnp.clip(d, -CLAMP, CLAMP))


def _clipped(ratio, logprobs, old_logprobs, advantages, mask, low, high) -> Loss:
    per_token, clipped = clipped_surrogate(ratio, _on_row(advantages, mask), low, high)
    return finish(per_token, log_ratio(logprobs, old_logprobs, mask), mask, clip_fraction=clipped)
