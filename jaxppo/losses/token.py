"""Policy losses that look at one token at a time. Conventions: `jaxppo.losses`."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxppo import masked
from jaxppo.losses.shared import CLAMP, Diagnostics, finish, log_ratio
from jaxppo.masked import Mask
from jaxppo.types import Scalar


def reinforce(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """The plain policy gradient: −A log π (Williams 1992,
    https://doi.org/10.1007/BF00992696).

    >>> import jax.numpy as jnp
    >>> lp, a, m = (
    ...     jnp.array([[-1.0, -2.0, -3.0]]),
    ...     jnp.array([[1.0, -1.0, 1.0]]),
    ...     jnp.array([[1.0, 1.0, 0.0]]),
    ... )
    >>> reinforce(lp, lp, a, m)[0]
    Array([[ 1., -2.,  0.]], dtype=float32)
    """
    per_token = -masked.keep(advantages, mask) * masked.keep(logprobs, mask)
    return finish(per_token, log_ratio(logprobs, old_logprobs, mask), mask)


def clip(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    low: Scalar = 0.2,
    high: Scalar = 0.2,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """PPO: −min(r A, clip(r, 1 − low, 1 + high) A) (https://arxiv.org/abs/1707.06347).

    high > low is DAPO's clip-higher (https://arxiv.org/abs/2503.14476).

    >>> import jax.numpy as jnp
    >>> lp, a, m = (
    ...     jnp.log(jnp.array([[1.5, 1.5, 1.1]])),
    ...     jnp.array([[1.0, -1.0, 1.0]]),
    ...     jnp.ones((1, 3)),
    ... )
    >>> clip(lp, 0 * lp, a, m)[0]
    Array([[-1.2,  1.5, -1.1]], dtype=float32)
    """
    d = log_ratio(logprobs, old_logprobs, mask)
    per_token, clipped = clipped_surrogate(jnp.exp(d), masked.keep(advantages, mask), low, high)
    return finish(per_token, d, mask, clip_fraction=clipped)


def dual_clip(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    low: Scalar = 0.2,
    high: Scalar = 0.2,
    ceiling: Scalar = 3.0,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """`clip`, and where A < 0 at most −ceiling · A, however large the ratio
    (https://arxiv.org/abs/1912.09729).

    "ceiling_fraction" counts the tokens at the ceiling.

    >>> import jax.numpy as jnp
    >>> lp, a, m = (
    ...     jnp.log(jnp.array([[1.5, 5.0, 5.0]])),
    ...     jnp.array([[-1.0, -1.0, 1.0]]),
    ...     jnp.ones((1, 3)),
    ... )
    >>> dual_clip(lp, 0 * lp, a, m)[0]
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


def kl_penalty(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    beta: Scalar,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """PPO with a penalty in place of clipping: −r A + β (r − 1 − d)
    (https://arxiv.org/abs/1707.06347, section 4).

    The tokens were drawn from the old policy, so r − 1 − d estimates KL(old‖new) with
    the right gradient.

    >>> import jax.numpy as jnp, numpy as np
    >>> lp, a, m = (
    ...     jnp.log(jnp.array([[2.0, 1.0, 0.5]])),
    ...     jnp.array([[1.0, 1.0, -1.0]]),
    ...     jnp.ones((1, 3)),
    ... )
    >>> print(np.asarray(kl_penalty(lp, 0 * lp, a, m, beta=1.0)[0]).round(3))
    [[-1.693 -1.     0.693]]
    """
    d = log_ratio(logprobs, old_logprobs, mask)
    return finish(-jnp.exp(d) * masked.keep(advantages, mask) + beta * (jnp.expm1(d) - d), d, mask)


def cispo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    low: Scalar = 1.0,
    high: Scalar = 0.28,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """Clipped weights that keep every token's gradient: −sg(clip(r, 1 − low, 1 + high))
    A log π.

    From https://arxiv.org/abs/2506.13585. The default low = 1 is no lower bound.

    >>> import jax.numpy as jnp
    >>> lp, old = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, -3.0]])
    >>> cispo(lp, old, jnp.array([[1.0, 1.0]]), jnp.ones((1, 2)))[0]
    Array([[1.  , 1.28]], dtype=float32)
    """
    d = log_ratio(logprobs, old_logprobs, mask)
    ratio = lax.stop_gradient(jnp.exp(d))
    weight = jnp.clip(ratio, 1 - low, 1 + high)
    per_token = -weight * masked.keep(advantages, mask) * masked.keep(logprobs, mask)
    return finish(per_token, d, mask, clip_fraction=weight != ratio)


def sapo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    tau_positive: Scalar = 1.0,
    tau_negative: Scalar = 1.05,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """A soft gate in place of the clip: −(4 / τ) sigmoid(τ (r − 1)) A
    (https://arxiv.org/abs/2511.20347).

    τ is tau_positive where A > 0, else tau_negative. At r = 1 the slope is that of −r
    A.

    >>> import jax.numpy as jnp, numpy as np
    >>> lp, a = jnp.log(jnp.array([[1.0, 2.0, 1.0]])), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(np.asarray(sapo(lp, 0 * lp, a, jnp.ones((1, 3)))[0]).round(3))
    [[-2.    -2.924  1.905]]
    """
    d, advantages = log_ratio(logprobs, old_logprobs, mask), masked.keep(advantages, mask)
    tau = jnp.where(
        advantages > 0, jnp.asarray(tau_positive, d.dtype), jnp.asarray(tau_negative, d.dtype)
    )
    gate = 4 / tau / (1 + jnp.exp(-jnp.clip(tau * jnp.expm1(d), -4 * CLAMP, 4 * CLAMP)))
    return finish(-gate * advantages, d, mask)


def dppo_tv(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    low: Scalar = 0.15,
    high: Scalar = 0.15,
    cap: Scalar = 20.0,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """Trust region by probability: −sg(min(r, cap)) A log π, 0 where π has moved too
    far (https://arxiv.org/abs/2602.04879).

    Too far: π − π_old > high where A > 0, π − π_old < −low elsewhere.

    >>> import jax.numpy as jnp, numpy as np
    >>> lp, old = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.4, 0.1]]))
    >>> print(
    ...     np.asarray(
    ...         dppo_tv(lp, old, jnp.array([[1.0, 1.0]]), jnp.ones((1, 2)))[0]
    ...     ).round(3)
    ... )
    [[0.866 0.   ]]
    """
    moved = jnp.exp(masked.keep(logprobs, mask)) - jnp.exp(masked.keep(old_logprobs, mask))
    outside = jnp.where(masked.keep(advantages, mask) > 0, moved > high, moved < -low)
    return _trusted(logprobs, old_logprobs, advantages, mask, outside, cap)


def dppo_kl(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    low: Scalar = 0.05,
    high: Scalar = 0.05,
    cap: Scalar = 20.0,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """`dppo_tv` with the distance p log(p / q) + (1 − p) log((1 − p) / (1 − q)), p =
    π_old, q = π.

    Too far: the distance exceeds high and π > π_old where A > 0, or exceeds low and π <
    π_old elsewhere (https://arxiv.org/abs/2602.04879).

    >>> import jax.numpy as jnp, numpy as np
    >>> lp, old = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.4, 0.1]]))
    >>> print(
    ...     np.asarray(
    ...         dppo_kl(lp, old, jnp.array([[1.0, 1.0]]), jnp.ones((1, 2)))[0]
    ...     ).round(3)
    ... )
    [[0.866 0.   ]]
    """
    new, old = masked.keep(logprobs, mask), masked.keep(old_logprobs, mask)
    p, q = jnp.exp(old), jnp.exp(new)
    # 1e-8 as in the method's public implementation: a probability that rounds to 1 has
    # no log(1 − p).
    distance = p * (old - new) + (1 - p) * jnp.log((1 - p + 1e-8) / (1 - q + 1e-8))
    outside = jnp.where(
        masked.keep(advantages, mask) > 0, (distance > high) & (q > p), (distance > low) & (q < p)
    )
    return _trusted(logprobs, old_logprobs, advantages, mask, outside, cap)


def clipped_surrogate(
    ratio: Array, advantages: Array, low: Scalar, high: Scalar
) -> tuple[Array, Array]:
    """−min(r A, clip(r) A), and where the clipped branch was taken."""
    plain, held = -ratio * advantages, -jnp.clip(ratio, 1 - low, 1 + high) * advantages
    return jnp.maximum(plain, held), held > plain


def _trusted(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    outside: Array,
    cap: Scalar,
):
    d = log_ratio(logprobs, old_logprobs, mask)
    weight = jnp.where(outside, 0, jnp.minimum(lax.stop_gradient(jnp.exp(d)), cap))
    per_token = -weight * masked.keep(advantages, mask) * masked.keep(logprobs, mask)
    return finish(per_token, d, mask, clip_fraction=outside)


def dro(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    beta: Scalar,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """The policy gradient with a quadratic pull: −(A log π − β d² / 2)
    (https://arxiv.org/abs/2405.19107).

    >>> import jax.numpy as jnp
    >>> lp, old = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, -3.0]])
    >>> dro(lp, old, jnp.ones((1, 2)), jnp.ones((1, 2)), beta=0.5)[0]
    Array([[1., 2.]], dtype=float32)
    """
    d = log_ratio(logprobs, old_logprobs, mask)
    per_token = (
        -masked.keep(advantages, mask) * masked.keep(logprobs, mask) + beta * jnp.square(d) / 2
    )
    return finish(per_token, d, mask)


def awr(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    temperature: Scalar = 1.0,
    weight_max: Scalar = 20.0,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """Advantage-weighted regression: −min(exp(A / temperature), weight_max) log π
    (https://arxiv.org/abs/1910.00177).

    The method's own implementation whitens A first. "clip_fraction" counts the tokens
    at weight_max.

    >>> import jax.numpy as jnp
    >>> lp = jnp.array([[-1.0, -1.0]])
    >>> awr(lp, lp, jnp.array([[0.0, 9.0]]), jnp.ones((1, 2)))[0]
    Array([[ 1., 20.]], dtype=float32)
    """
    exponent = masked.keep(advantages, mask) / temperature
    highest = jnp.log(jnp.asarray(weight_max, exponent.dtype))
    capped = exponent > highest
    weight = jnp.where(capped, weight_max, jnp.exp(jnp.where(capped, 0, exponent)))
    per_token = -weight * masked.keep(logprobs, mask)
    return finish(per_token, log_ratio(logprobs, old_logprobs, mask), mask, clip_fraction=capped)
