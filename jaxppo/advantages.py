"""Advantage estimators: rewards and values of tokens, or scores of whole sequences, to
advantages.

Rows of a group (samples of one prompt) are adjacent. `valid` False takes a row out of
its group's baseline and deviation, and gives it 0. A group with one valid row, or whose
scores are all equal, gives 0. Nothing is whitened unless the function says so, and what
the mask leaves out (or `valid`) is 0 in the result whatever stood there.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Real

from jaxppo import masked
from jaxppo.masked import AxisName, Mask
from jaxppo.types import Scalar


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Mask,
    *,
    gamma: Scalar,
    lam: Scalar | Float[Array, "B 1"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation (https://arxiv.org/abs/1506.02438); returns
    (advantages, returns).

    δₜ = rₜ + γ V₊ − Vₜ,  Aₜ = δₜ + γ λ A₊,  Rₜ = Aₜ + Vₜ

    V₊ and A₊ belong to the next acting token, and are 0 after the last one:
    observations between a model's turns (mask 0) are stepped over without discount, and
    their rewards and values are never read.

    Shapes: rewards, values, mask [B T]; lam a scalar, or [B 1] for a λ that depends on
    the length.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.0, 0.0, 1.0]])
    >>> gae(x, jnp.full((1, 3), 0.5), jnp.ones((1, 3)), gamma=1.0, lam=0.5)[0]
    Array([[0.125, 0.25 , 0.5  ]], dtype=float32)
    """
    m = mask.astype(bool)
    rewards, values = masked.keep(rewards, m), masked.keep(values, m)
    lam = jnp.broadcast_to(jnp.asarray(lam, rewards.dtype), (rewards.shape[0], 1))[:, 0]
    gamma = jnp.asarray(gamma, rewards.dtype)

    def step(after, now):
        next_value, next_advantage = after
        acting, reward, value = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        after = jnp.where(acting, value, next_value), jnp.where(acting, advantage, next_advantage)
        return after, advantage

    zero = jnp.zeros_like(rewards[:, 0])
    _, advantages = lax.scan(step, (zero, zero), (m.T, rewards.T, values.T), reverse=True)
    return masked.keep(advantages.T, m), masked.keep(advantages.T + values, m)


def length_adaptive_lam(mask: Mask, *, alpha: Scalar) -> Float[Array, "B 1"]:
    """A λ that grows with the length n of the response: λ = 1 − 1 / (α n), and 0 where
    α n < 1 (https://arxiv.org/abs/2504.05118).

    So λ / (1 − λ), the reach of GAE, is proportional to the length. Rescale α for short
    responses: with the paper's .05 every response of up to 20 tokens has λ = 0.

    >>> import jax.numpy as jnp
    >>> length_adaptive_lam(
    ...     jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]), alpha=0.5
    ... )
    Array([[0.5],
           [0. ]], dtype=float32)
    """
    length = jnp.sum(mask.astype(bool), axis=1, keepdims=True, dtype=jnp.result_type(float))
    return 1 - 1 / jnp.maximum(alpha * length, 1)


def returns_to_go(
    rewards: Float[Array, "B T"], mask: Mask, *, gamma: Scalar
) -> Float[Array, "B T"]:
    """The discounted rewards that follow: Gₜ = rₜ + γ G₊, over acting tokens.

    It is `gae` without values at λ = 1 (https://arxiv.org/abs/1506.02438, section 3).

    >>> import jax.numpy as jnp
    >>> returns_to_go(jnp.array([[1.0, 0.0, 4.0]]), jnp.ones((1, 3)), gamma=0.5)
    Array([[2., 2., 4.]], dtype=float32)
    """
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def reinforce_plus_plus(
    rewards: Float[Array, "B T"],
    mask: Mask,
    *,
    gamma: Scalar,
    ddof: int = 1,
    axis_name: AxisName = None,
) -> Float[Array, "B T"]:
    """Returns-to-go, whitened over all tokens of the batch: (Gₜ − mean G) / std G
    (https://arxiv.org/abs/2501.03262).

    >>> import jax.numpy as jnp
    >>> reinforce_plus_plus(jnp.array([[1.0, 1.0]]), jnp.ones((1, 2)), gamma=1.0, ddof=0)
    Array([[ 1., -1.]], dtype=float32)
    """
    return masked.whiten(
        returns_to_go(rewards, mask, gamma=gamma), mask, ddof=ddof, axis_name=axis_name
    )


def remax(
    rewards: Float[Array, "B T"], greedy_scores: Float[Array, "B"], mask: Mask
) -> Float[Array, "B T"]:
    """Returns-to-go less the score of the greedy response: Gₜ − R_greedy
    (https://arxiv.org/abs/2310.10505).

    >>> import jax.numpy as jnp
    >>> remax(jnp.array([[0.0, 3.0]]), jnp.array([1.0]), jnp.ones((1, 2)))
    Array([[2., 2.]], dtype=float32)
    """
    return masked.keep(returns_to_go(rewards, mask, gamma=1.0) - greedy_scores[:, None], mask)


def group(
    scores: Float[Array, "B"],
    *,
    group_size: int,
    normalise_std: bool = True,
    eps: float = 1e-6,
    valid: Bool[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Group-relative advantages: (Rᵢ − mean) / (std + eps), std with ddof = 1 (GRPO,
    https://arxiv.org/abs/2402.03300).

    Without `normalise_std` the plain difference: Dr. GRPO,
    https://arxiv.org/abs/2503.20783. Raises ValueError if the rows are not a whole
    number of groups.

    >>> import jax.numpy as jnp
    >>> group(jnp.array([1.0, 3.0, 5.0]), group_size=3)
    Array([-0.9999995,  0.       ,  0.9999995], dtype=float32)
    """
    scores, m = _groups(scores, valid, group_size)
    difference = _centre(scores, m)
    if normalise_std:
        difference = difference / (_std(difference, m) + eps)
    return masked.keep(difference, m).reshape(-1)


def rloo(
    scores: Float[Array, "B"], *, group_size: int, valid: Bool[Array, "B"] | None = None
) -> Float[Array, "B"]:
    """The score less the mean of the group's others: Rᵢ − mean_{j≠i} Rⱼ
    (https://arxiv.org/abs/2402.14740).

    Raises ValueError if the rows are not a whole number of groups.

    >>> import jax.numpy as jnp
    >>> rloo(jnp.array([1.0, 3.0, 5.0]), group_size=3)
    Array([-3.,  0.,  3.], dtype=float32)
    """
    scores, m = _groups(scores, valid, group_size)
    count = _count(m, scores.dtype)
    return masked.keep(_centre(scores, m) * count / jnp.maximum(count - 1, 1), m).reshape(-1)


def opo(
    scores: Float[Array, "B"],
    lengths: Real[Array, "B"],
    *,
    group_size: int,
    valid: Bool[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """The score less the group's mean weighted by length: Rᵢ − Σ nⱼ Rⱼ / Σ nⱼ
    (https://arxiv.org/abs/2505.23585).

    A group without any tokens gives 0. Raises ValueError if the rows are not a whole
    number of groups.

    >>> import jax.numpy as jnp
    >>> opo(jnp.array([1.0, 5.0]), jnp.array([3, 1]), group_size=2)
    Array([-1.,  3.], dtype=float32)
    """
    scores, m = _groups(scores, valid, group_size)
    weights = masked.keep(lengths.reshape(m.shape).astype(scores.dtype), m)
    used = m & (jnp.sum(weights, axis=-1, keepdims=True) > 0)
    return masked.keep(_centre(scores, m, weights), used).reshape(-1)


def gpg(
    scores: Float[Array, "B"],
    *,
    group_size: int,
    valid: Bool[Array, "B"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "B"]:
    """Group policy gradient: α (Rᵢ − mean), α = rows / rows of groups whose scores
    differ (https://arxiv.org/abs/2504.02546).

    α makes up for the groups that teach nothing. Raises ValueError if the rows are not
    a whole number of groups.

    >>> import jax.numpy as jnp
    >>> gpg(jnp.array([1.0, 3.0, 2.0, 2.0]), group_size=2)
    Array([-2.,  2.,  0.,  0.], dtype=float32)
    """
    scores, m = _groups(scores, valid, group_size)
    difference = masked.keep(_centre(scores, m), m)
    informative = m & jnp.any(difference != 0, axis=-1, keepdims=True)
    rows = masked.total(m, m, axis_name=axis_name).astype(scores.dtype)
    useful = masked.total(informative, informative, axis_name=axis_name).astype(scores.dtype)
    return (difference * (rows / jnp.maximum(useful, 1))).reshape(-1)


def gdpo(
    scores: Float[Array, "B R"],
    *,
    group_size: int,
    weights: Float[Array, "R"] | None = None,
    eps: float = 1e-6,
    valid: Bool[Array, "B"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "B"]:
    """Several rewards, each normalised in its group, summed, then normalised over the
    batch (https://arxiv.org/abs/2601.05242).

    sᵢ = Σᵣ wᵣ (Rᵢᵣ − meanᵣ) / (stdᵣ + eps),  Aᵢ = (sᵢ − mean s) / (std s + eps), both deviations with ddof = 1

    A sum of raw rewards would let combinations with equal sums collapse into one.
    Raises ValueError as `group` does.

    >>> import jax.numpy as jnp, numpy as np
    >>> print(np.asarray(gdpo(jnp.array([[0.0, 1.0], [1.0, 9.0]]), group_size=2)).round(3))
    [-0.707  0.707]
    """
    columns = jnp.stack(
        [group(x, group_size=group_size, eps=eps, valid=valid) for x in scores.T], axis=1
    )
    summed = jnp.sum(columns if weights is None else columns * weights[None, :], axis=1)
    m = jnp.ones_like(summed, bool) if valid is None else valid
    variance = masked.var(summed, m, ddof=1, axis_name=axis_name)
    std = jnp.where(
        variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0
    )  # the root's slope at 0 is infinite
    return masked.keep((summed - masked.mean(summed, m, axis_name=axis_name)) / (std + eps), m)


def last_acting(mask: Mask) -> Bool[Array, "B T"]:
    """True on the last acting token of each row, mₜ = 1 and Σ_{k>t} mₖ = 0. No token of
    an empty row.

    There a sequence's score belongs, not on the padding after it
    (https://arxiv.org/abs/2403.17031).

    >>> import jax.numpy as jnp
    >>> last_acting(jnp.array([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    Array([[False, False,  True, False],
           [False, False, False, False]], dtype=bool)
    """
    m = mask.astype(bool)
    # acting tokens from here on
    following = lax.cumsum(m.astype(jnp.int32), axis=1, reverse=True)
    return m & (following == 1)


def _groups(scores: Array, valid: Array | None, group_size: int) -> tuple[Array, Array]:
    """Scores and their mask as [groups, group_size], invalid scores 0."""
    if scores.shape[0] % group_size:
        raise ValueError(f"{scores.shape[0]} rows are not a multiple of group_size {group_size}")
    m = jnp.ones_like(scores, bool) if valid is None else valid.astype(bool)
    return masked.keep(scores, m).reshape(-1, group_size), m.reshape(-1, group_size)


def _count(m: Array, dtype) -> Array:
    return jnp.sum(m, axis=-1, keepdims=True, dtype=dtype)


def _centre(scores: Array, m: Array, weights: Array | None = None) -> Array:
    """Scores less their group's (weighted) mean."""
    weights = m.astype(scores.dtype) if weights is None else weights
    # From the group's best, so that equal scores give exactly 0: a mean's rounding
    # error over a tiny std is not small.
    best = jnp.max(jnp.where(m, scores, -jnp.inf), axis=-1, keepdims=True)
    scores = jnp.where(m, scores - best, 0)
    weight = jnp.sum(weights, axis=-1, keepdims=True)
    return scores - jnp.sum(weights * scores, axis=-1, keepdims=True) / jnp.where(
        weight > 0, weight, 1
    )


def _std(difference: Array, m: Array) -> Array:
    squares = jnp.sum(jnp.where(m, jnp.square(difference), 0), axis=-1, keepdims=True)
    variance = squares / jnp.maximum(_count(m, difference.dtype) - 1, 1)
    return jnp.sqrt(jnp.where(variance > 0, variance, 1)) * (variance > 0).astype(difference.dtype)
