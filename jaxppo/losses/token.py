"""Policy losses that treat each token alone. Conventions: `jaxppo.losses`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import masked
from jaxppo.losses.shared import CLAMP, Key, Loss, finish, log_ratio
from jaxppo.masked import Mask
from jaxppo.types import BT, B, Scalar

# Policy gradient and PPO


def reinforce(
    logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *, key: Key = None
) -> Loss:
    """The plain policy gradient: −A log π (Williams 1992,
    https://doi.org/10.1007/BF00992696).

    >>> lp, a = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[1.0, -1.0, 1.0]])
    >>> reinforce(lp, lp, a, jnp.array([[1.0, 1.0, 0.0]]))[0]
    Array([[ 1., -2.,  0.]], dtype=float32)
    """
    per_token = -masked.keep(advantages, mask) * masked.keep(logprobs, mask)
    return finish(per_token, log_ratio(logprobs, old_logprobs, mask), mask)


def clip(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *,
         low: Scalar = 0.2, high: Scalar = 0.2, key: Key = None) -> Loss:  # fmt: skip
    """PPO: −min(r A, clip(r, 1 − low, 1 + high) A) (https://arxiv.org/abs/1707.06347).

    high > low is DAPO's clip-higher (https://arxiv.org/abs/2503.14476).

    >>> lp, a = jnp.log(jnp.array([[1.5, 1.5, 1.1]])), jnp.array([[1.0, -1.0, 1.0]])
    >>> clip(lp, 0 * lp, a, jnp.ones((1, 3)))[0]
    Array([[-1.2,  1.5, -1.1]], dtype=float32)
    """
    d = log_ratio(logprobs, old_logprobs, mask)
    per_token, clipped = clipped_surrogate(jnp.exp(d), masked.keep(advantages, mask), low, high)
    return finish(per_token, d, mask, clip_fraction=clipped)


def dual_clip(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *, low: Scalar = 0.2,
              high: Scalar = 0.2, ceiling: Scalar = 3.0, key: Key = None) -> Loss:  # fmt: skip
    """`clip`, and at most −ceiling · A where A < 0 (https://arxiv.org/abs/1912.09729).

    "ceiling_fraction" counts the tokens at the ceiling.

    >>> lp, a = jnp.log(jnp.array([[1.5, 5.0, 5.0]])), jnp.array([[-1.0, -1.0, 1.0]])
    >>> dual_clip(lp, 0 * lp, a, jnp.ones((1, 3)))[0]
    Array([[ 1.5,  3. , -1.2]], dtype=float32)
    """
    d, advantages = log_ratio(logprobs, old_logprobs, mask), masked.keep(advantages, mask)
    per_token, clipped = clipped_surrogate(jnp.exp(d), advantages, low, high)
    negative = advantages < 0
    # an infinite ceiling times 0 is NaN
    highest = -ceiling * jnp.where(negative, advantages, -1)
    capped = per_token > highest
    per_token = jnp.where(negative, jnp.minimum(per_token, highest), per_token)
    return finish(per_token, d, mask, clip_fraction=clipped, ceiling_fraction=capped)


def kl_penalty(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *,
               beta: Scalar, key: Key = None) -> Loss:  # fmt: skip
    """PPO with a KL penalty instead of clipping: −r A + β (r − 1 − d)
    (https://arxiv.org/abs/1707.06347, section 4).

    r − 1 − d estimates KL(old‖new), because the old policy sampled the tokens.

    >>> lp, a = jnp.log(jnp.array([[2.0, 1.0, 0.5]])), jnp.array([[1.0, 1.0, -1.0]])
    >>> loss = kl_penalty(lp, 0 * lp, a, jnp.ones((1, 3)), beta=1.0)[0]
    >>> print(jax.device_get(loss).round(3))
    [[-1.693 -1.     0.693]]
    """
    d = log_ratio(logprobs, old_logprobs, mask)
    return finish(-jnp.exp(d) * masked.keep(advantages, mask) + beta * (jnp.expm1(d) - d), d, mask)


# Other bounds on the ratio


def cispo(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *,
          low: Scalar = 1.0, high: Scalar = 0.28, key: Key = None) -> Loss:  # fmt: skip
    """CISPO clips the weight and keeps every token's gradient: −sg(clip(r, 1 − low,
    1 + high)) A log π (https://arxiv.org/abs/2506.13585).

    The default low = 1 sets no lower bound.

    >>> lp, old = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, -3.0]])
    >>> cispo(lp, old, jnp.ones((1, 2)), jnp.ones((1, 2)))[0]
    Array([[1.  , 1.28]], dtype=float32)
    """
    d = log_ratio(logprobs, old_logprobs, mask)
    ratio = jax.lax.stop_gradient(jnp.exp(d))
    weight = jnp.clip(ratio, 1 - low, 1 + high)
    per_token = -weight * masked.keep(advantages, mask) * masked.keep(logprobs, mask)
    return finish(per_token, d, mask, clip_fraction=weight != ratio)


def two_sided(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *,
              low: Scalar = 0.8, high: Scalar = 3.0, key: Key = None) -> Loss:  # fmt: skip
    """−r A, and 0 where the ratio leaves [1 − low, 1 + high], on either side and for
    either sign of A (SAO, https://arxiv.org/abs/2607.07508).

    `clip` lets a token come back from outside of its bounds; this does not. The
    denominators stay as they are.

    >>> lp, a = jnp.log(jnp.array([[1.5, 5.0, 5.0]])), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(jax.device_get(two_sided(lp, 0 * lp, a, jnp.ones((1, 3)))[0]).round(3))
    [[-1.5  0.   0. ]]
    """
    d = log_ratio(logprobs, old_logprobs, mask)
    ratio = jnp.exp(d)
    outside = (ratio < 1 - low) | (ratio > 1 + high)
    per_token = jnp.where(outside, 0, -ratio * masked.keep(advantages, mask))
    return finish(per_token, d, mask, clip_fraction=outside)


def sapo(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *, tau_positive: Scalar = 1.0,
         tau_negative: Scalar = 1.05, key: Key = None) -> Loss:  # fmt: skip
    """A soft gate instead of the clip: −(4 / τ) sigmoid(τ (r − 1)) A
    (https://arxiv.org/abs/2511.20347).

    τ is tau_positive where A > 0, else tau_negative. At r = 1 the slope is that of
    −r A.

    >>> lp, a = jnp.log(jnp.array([[1.0, 2.0, 1.0]])), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(jax.device_get(sapo(lp, 0 * lp, a, jnp.ones((1, 3)))[0]).round(3))
    [[-2.    -2.924  1.905]]
    """
    d, advantages = log_ratio(logprobs, old_logprobs, mask), masked.keep(advantages, mask)
    positive, negative = (jnp.asarray(tau, d.dtype) for tau in (tau_positive, tau_negative))
    tau = jnp.where(advantages > 0, positive, negative)
    gate = 4 / tau / (1 + jnp.exp(-jnp.clip(tau * jnp.expm1(d), -4 * CLAMP, 4 * CLAMP)))
    return finish(-gate * advantages, d, mask)


def dppo_tv(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *, low: Scalar = 0.15,
            high: Scalar = 0.15, cap: Scalar = 20.0, key: Key = None) -> Loss:  # fmt: skip
    """Trust region on probabilities: −sg(min(r, cap)) A log π, and 0 where π has moved
    too far (https://arxiv.org/abs/2602.04879).

    Too far: π − π_old > high where A > 0, π − π_old < −low elsewhere.

    >>> lp, old = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.4, 0.1]]))
    >>> loss = dppo_tv(lp, old, jnp.ones((1, 2)), jnp.ones((1, 2)))[0]
    >>> print(jax.device_get(loss).round(3))
    [[0.866 0.   ]]
    """
    moved = jnp.exp(masked.keep(logprobs, mask)) - jnp.exp(masked.keep(old_logprobs, mask))
    outside = jnp.where(masked.keep(advantages, mask) > 0, moved > high, moved < -low)
    return _trust_region(logprobs, old_logprobs, advantages, mask, outside, cap)


def dppo_kl(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *, low: Scalar = 0.05,
            high: Scalar = 0.05, cap: Scalar = 20.0, key: Key = None) -> Loss:  # fmt: skip
    """`dppo_tv` with the distance D = p log(p / q) + (1 − p) log((1 − p) / (1 − q)), p
    = π_old, q = π (https://arxiv.org/abs/2602.04879).

    Too far: D > high and q > p where A > 0, D > low and q < p elsewhere.

    >>> lp, old = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.4, 0.1]]))
    >>> loss = dppo_kl(lp, old, jnp.ones((1, 2)), jnp.ones((1, 2)))[0]
    >>> print(jax.device_get(loss).round(3))
    [[0.866 0.   ]]
    """
    new, old = masked.keep(logprobs, mask), masked.keep(old_logprobs, mask)
    p, q = jnp.exp(old), jnp.exp(new)
    # 1e-8 as in the authors' code: a probability that rounds to 1 has no log(1 − p).
    distance = p * (old - new) + (1 - p) * jnp.log((1 - p + 1e-8) / (1 - q + 1e-8))
    too_high, too_low = (distance > high) & (q > p), (distance > low) & (q < p)
    outside = jnp.where(masked.keep(advantages, mask) > 0, too_high, too_low)
    return _trust_region(logprobs, old_logprobs, advantages, mask, outside, cap)


# For data of another policy


def dro(
    logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *, beta: Scalar, key: Key = None
) -> Loss:
    """The policy gradient with a quadratic penalty: −(A log π − β d² / 2)
    (https://arxiv.org/abs/2405.19107).

    >>> lp, old = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, -3.0]])
    >>> dro(lp, old, jnp.ones((1, 2)), jnp.ones((1, 2)), beta=0.5)[0]
    Array([[1., 2.]], dtype=float32)
    """
    d = log_ratio(logprobs, old_logprobs, mask)
    gradient = -masked.keep(advantages, mask) * masked.keep(logprobs, mask)
    return finish(gradient + beta * jnp.square(d) / 2, d, mask)


def awr(logprobs: BT, old_logprobs: BT, advantages: BT, mask: Mask, *, temperature: Scalar = 1.0,
        weight_max: Scalar = 20.0, key: Key = None) -> Loss:  # fmt: skip
    """Advantage-weighted regression: −min(exp(A / temperature), weight_max) log π
    (https://arxiv.org/abs/1910.00177).

    The authors' code whitens A first. "clip_fraction" counts the tokens at weight_max.

    >>> lp, a = jnp.array([[-1.0, -1.0]]), jnp.array([[0.0, 9.0]])
    >>> awr(lp, lp, a, jnp.ones((1, 2)))[0]
    Array([[ 1., 20.]], dtype=float32)
    """
    exponent = masked.keep(advantages, mask) / temperature
    highest = jnp.log(jnp.asarray(weight_max, exponent.dtype))
    capped = exponent > highest
    weight = jnp.where(capped, weight_max, jnp.exp(jnp.where(capped, 0, exponent)))
    per_token = -weight * masked.keep(logprobs, mask)
    return finish(per_token, log_ratio(logprobs, old_logprobs, mask), mask, clip_fraction=capped)


def likelihood(logprobs: BT, scores: B, mask: Mask, *, threshold: Scalar = 0.0) -> BT:
    """Imitation of right answers: −log π on the rows with a score above the threshold,
    else 0 (VAPO, https://arxiv.org/abs/2504.05118).

    A term besides a policy loss. VAPO's is a mean over the tokens of those rows:
    aggregate over their mask, not over that of all rows.

    >>> lp, m = jnp.array([[-1.0, -2.0], [-3.0, -4.0]]), jnp.ones((2, 2))
    >>> likelihood(lp, jnp.array([1.0, 0.0]), m)
    Array([[1., 2.],
           [0., 0.]], dtype=float32)
    """
    return masked.keep(-logprobs, mask.astype(bool) & (scores > threshold)[:, None])


def clipped_surrogate(
    ratio: Array, advantages: Array, low: Scalar, high: Scalar
) -> tuple[Array, Array]:
    """(−min(r A, clip(r) A), where the clipped branch was taken)."""
    plain, held = -ratio * advantages, -jnp.clip(ratio, 1 - low, 1 + high) * advantages
    return jnp.maximum(plain, held), held > plain


def _trust_region(logprobs, old_logprobs, advantages, mask, outside, cap):
    d = log_ratio(logprobs, old_logprobs, mask)
    weight = jnp.where(outside, 0, jnp.minimum(jax.lax.stop_gradient(jnp.exp(d)), cap))
    per_token = -weight * masked.keep(advantages, mask) * masked.keep(logprobs, mask)
    return finish(per_token, d, mask, clip_fraction=outside)
