"""Advantage estimators, from the rewards of tokens or the scores of sequences.

Rows of a group (samples of one prompt) are adjacent. A row with `valid` False is
excluded from its group's statistics and gets 0. A group with one valid row, or with
equal scores, gives 0. Nothing is whitened unless the function says so. Results are 0
where the mask is 0, whatever the inputs are there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from jaxppo import masked
from jaxppo.masked import AxisName, Mask
from jaxppo.types import BT, B, Scalar

Valid = Bool[Array, "B"] | None


def gae(
    rewards: BT, values: BT, mask: Mask, *, gamma: Scalar | BT, lam: Scalar | Float[Array, "B 1"]
) -> tuple[BT, BT]:
    """Generalised advantage estimation (https://arxiv.org/abs/1506.02438); returns
    (advantages, returns).

    δₜ = rₜ + γ V₊ − Vₜ,  Aₜ = δₜ + γ λ A₊,  Rₜ = Aₜ + Vₜ

    V₊ and A₊ belong to the next acting token, and are 0 after the last one.
    Observations between turns (mask 0) are skipped without discount; their rewards and
    values are not read.

    Shapes: rewards, values, mask [B T]; gamma a scalar, or [B T] for a discount between
    a token and the next (`turn_discounts`); lam a scalar, or [B 1] for a λ that depends
    on the length.

    >>> x = jnp.array([[0.0, 0.0, 1.0]])
    >>> gae(x, jnp.full((1, 3), 0.5), jnp.ones((1, 3)), gamma=1.0, lam=0.5)[0]
    Array([[0.125, 0.25 , 0.5  ]], dtype=float32)
    """
    m = mask.astype(bool)
    rewards, values = masked.keep(rewards, m), masked.keep(values, m)
    lam = jnp.broadcast_to(jnp.asarray(lam, rewards.dtype), (rewards.shape[0], 1))[:, 0]
    gamma = jnp.broadcast_to(jnp.asarray(gamma, rewards.dtype), rewards.shape)

    def step(after, now):
        next_value, next_advantage = after
        acting, reward, value, gamma = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        after = jnp.where(acting, value, next_value), jnp.where(acting, advantage, next_advantage)
        return after, advantage

    zero = jnp.zeros_like(rewards[:, 0])
    by_time = (m.T, rewards.T, values.T, gamma.T)
    _, advantages = jax.lax.scan(step, (zero, zero), by_time, reverse=True)
    return masked.keep(advantages.T, m), masked.keep(advantages.T + values, m)


def turn_discounts(mask: Mask, *, gamma: Scalar, turn_gamma: Scalar) -> BT:
    """γ from a token to the next of its turn, and γ · γ_turn to the first of the next
    turn, for `gae` and `returns_to_go` (discounts across and within turns as in VAGEN,
    https://github.com/williamzhangNU/VAGEN).

    A turn ends where the next slot is not an acting token.

    >>> mask = jnp.array([[1.0, 1.0, 0.0, 1.0]])
    >>> turn_discounts(mask, gamma=1.0, turn_gamma=0.5)
    Array([[1. , 0.5, 1. , 0.5]], dtype=float32)
    """
    m = mask.astype(bool)
    ends = m & ~jnp.pad(m[:, 1:], ((0, 0), (0, 1)))
    gamma = jnp.asarray(gamma, jnp.result_type(float))
    return jnp.where(ends, gamma * turn_gamma, gamma)


def turn_gae(rewards: BT, values: BT, mask: Mask, *, gamma: Scalar, lam: Scalar) -> tuple[BT, BT]:
    """`gae` with each turn as one action: its reward is the sum over its tokens, its
    value that of the state before its first token (turn-level PPO,
    https://arxiv.org/abs/2512.17008); returns (advantages, returns).

    δₖ = rₖ + γ Vₖ₊₁ − Vₖ,  Aₖ = δₖ + γ λ Aₖ₊₁,  Rₖ = Aₖ + Vₖ

    Every token of a turn gets its A and R.

    >>> rewards = jnp.array([[1.0, 2.0, 0.0, 4.0]])
    >>> mask = jnp.array([[1.0, 1.0, 0.0, 1.0]])
    >>> turn_gae(rewards, jnp.zeros((1, 4)), mask, gamma=0.5, lam=1.0)[0]
    Array([[5., 5., 0., 4.]], dtype=float32)
    """
    m = mask.astype(bool)
    begins = m & ~jnp.pad(m[:, :-1], ((0, 0), (1, 0)))
    within = turn_discounts(mask, gamma=1.0, turn_gamma=0.0)
    sums = returns_to_go(rewards, mask, gamma=within)
    first, _ = gae(sums, values, begins, gamma=gamma, lam=lam)
    slots = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    own = jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)
    spread = lambda x: masked.keep(jnp.take_along_axis(x, own, 1), m)
    return spread(first), spread(first + masked.keep(values, begins))


def length_adaptive_lam(mask: Mask, *, alpha: Scalar) -> Float[Array, "B 1"]:
    """A λ that grows with the length n of the response: λ = 1 − 1 / (α n), and 0 where
    α n < 1 (https://arxiv.org/abs/2504.05118).

    The horizon of GAE, λ / (1 − λ), is then proportional to the length. Rescale α for
    short responses: with the paper's .05 every response of up to 20 tokens has λ = 0.

    >>> mask = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    >>> length_adaptive_lam(mask, alpha=0.5)
    Array([[0.5],
           [0. ]], dtype=float32)
    """
    length = jnp.sum(mask.astype(bool), axis=1, keepdims=True, dtype=jnp.result_type(float))
    return 1 - 1 / jnp.maximum(alpha * length, 1)


def returns_to_go(rewards: BT, mask: Mask, *, gamma: Scalar | BT) -> BT:
    """The discounted sum of this and later rewards: Gₜ = rₜ + γ G₊, over acting tokens.

    `gae` without values at λ = 1 (https://arxiv.org/abs/1506.02438, section 3).

    >>> returns_to_go(jnp.array([[1.0, 0.0, 4.0]]), jnp.ones((1, 3)), gamma=0.5)
    Array([[2., 2., 4.]], dtype=float32)
    """
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def reinforce_plus_plus(
    rewards: BT, mask: Mask, *, gamma: Scalar, ddof: int = 1, axis_name: AxisName = None
) -> BT:
    """Returns-to-go, whitened over all tokens of the batch: (Gₜ − mean G) / std G
    (https://arxiv.org/abs/2501.03262).

    >>> rewards, mask = jnp.array([[1.0, 1.0]]), jnp.ones((1, 2))
    >>> reinforce_plus_plus(rewards, mask, gamma=1.0, ddof=0)
    Array([[ 1., -1.]], dtype=float32)
    """
    returns = returns_to_go(rewards, mask, gamma=gamma)
    return masked.whiten(returns, mask, ddof=ddof, axis_name=axis_name)


def remax(rewards: BT, greedy_scores: B, mask: Mask) -> BT:
    """Returns-to-go minus the score of the greedy response: Gₜ − R_greedy
    (https://arxiv.org/abs/2310.10505).

    >>> remax(jnp.array([[0.0, 3.0]]), jnp.array([1.0]), jnp.ones((1, 2)))
    Array([[2., 2.]], dtype=float32)
    """
    return masked.keep(returns_to_go(rewards, mask, gamma=1.0) - greedy_scores[:, None], mask)


def group(
    scores: B,
    *,
    group_size: int,
    normalise_std: bool = True,
    eps: float = 1e-6,
    valid: Valid = None,
) -> B:
    """Group-relative advantages: (Rᵢ − mean) / (std + eps), std with ddof = 1 (GRPO,
    https://arxiv.org/abs/2402.03300).

    With `normalise_std` False: Rᵢ − mean (Dr. GRPO, https://arxiv.org/abs/2503.20783).
    Raises ValueError if the rows are not a multiple of group_size.

    >>> group(jnp.array([1.0, 3.0, 5.0]), group_size=3)
    Array([-0.9999995,  0.       ,  0.9999995], dtype=float32)
    """
    scores, m = _groups(scores, valid, group_size)
    difference = _centre(scores, m)
    if normalise_std:
        difference = difference / (_std(difference, m) + eps)
    return masked.keep(difference, m).reshape(-1)


def group_over_batch(
    scores: B,
    *,
    group_size: int,
    eps: float = 1e-4,
    valid: Valid = None,
    axis_name: AxisName = None,
) -> B:
    """`group` with the deviation of the whole batch: (Rᵢ − group mean) / (batch std +
    eps), ddof = 1 (https://arxiv.org/abs/2508.08221).

    A group whose scores are nearly equal does not count more than others. (Neither this
    nor `group` leaves the row itself out of the deviation, as one implementation does:
    in a small group the rest may differ by almost nothing.) Raises ValueError if the
    rows are not a multiple of group_size.

    >>> x = group_over_batch(jnp.array([0.0, 4.0, 4.0, 4.0]), group_size=2)
    >>> print(jax.device_get(x).round(3))
    [-1.  1.  0.  0.]
    """
    scores, m = _groups(scores, valid, group_size)
    std = _root(masked.var(scores, m, ddof=1, axis_name=axis_name))
    return masked.keep(_centre(scores, m) / (std + eps), m).reshape(-1)


def max_rl(scores: B, *, group_size: int, eps: float = 1e-6, valid: Valid = None) -> B:
    """Maximum likelihood RL: (Rᵢ − mean) / (mean + eps), for scores of 0 and 1
    (https://arxiv.org/abs/2602.02710).

    The rarer success is in a group, the more it counts. A group whose mean is not
    positive gives 0: negative scores have no likelihood. Raises ValueError if the rows
    are not a multiple of group_size.

    >>> x = max_rl(jnp.array([1.0, 0.0, 0.0, 0.0]), group_size=4)
    >>> print(jax.device_get(x).round(3))
    [ 3. -1. -1. -1.]
    """
    scores, m = _groups(scores, valid, group_size)
    mean = jnp.sum(scores, axis=-1, keepdims=True) / jnp.maximum(_count(m, scores.dtype), 1)
    positive = mean > 0
    relative = _centre(scores, m) / (jnp.where(positive, mean, 1) + eps)
    return masked.keep(relative, m & positive).reshape(-1)


def pass_at_k(
    scores: B,
    *,
    group_size: int,
    normalise_std: bool = True,
    eps: float = 1e-6,
    valid: Valid = None,
) -> B:
    """For the best of k = group_size responses: its score minus the second best, 0 for
    the others (https://arxiv.org/abs/2503.19595); over (std + eps), ddof = 1.

    max_j Rⱼ − max_{j≠i} Rⱼ, so that E[max] rises and not E[R]. Two best rows give 0.
    Raises ValueError if the rows are not a multiple of group_size.

    >>> pass_at_k(jnp.array([1.0, 2.0, 5.0]), group_size=3, normalise_std=False)
    Array([0., 0., 3.], dtype=float32)
    """
    scores, m = _groups(scores, valid, group_size)
    difference = _centre(scores, m)
    known = jnp.where(m, difference, -jnp.inf)
    best = jnp.argmax(known, axis=-1, keepdims=True) == jnp.arange(group_size)[None]
    second = jnp.max(jnp.where(best, -jnp.inf, known), axis=-1, keepdims=True)
    lead = jnp.where(best & m & jnp.isfinite(second), difference - second, 0)
    return (lead / (_std(difference, m) + eps) if normalise_std else lead).reshape(-1)


def rloo(scores: B, *, group_size: int, valid: Valid = None) -> B:
    """The score minus the mean of the others in the group: Rᵢ − mean_{j≠i} Rⱼ
    (https://arxiv.org/abs/2402.14740).

    Raises ValueError if the rows are not a multiple of group_size.

    >>> rloo(jnp.array([1.0, 3.0, 5.0]), group_size=3)
    Array([-3.,  0.,  3.], dtype=float32)
    """
    scores, m = _groups(scores, valid, group_size)
    count = _count(m, scores.dtype)
    return masked.keep(_centre(scores, m) * count / jnp.maximum(count - 1, 1), m).reshape(-1)


def opo(scores: B, lengths: Real[Array, "B"], *, group_size: int, valid: Valid = None) -> B:
    """The score minus the group's mean weighted by length: Rᵢ − Σ nⱼ Rⱼ / Σ nⱼ
    (https://arxiv.org/abs/2505.23585).

    A group without tokens gives 0. Raises ValueError if the rows are not a multiple of
    group_size.

    >>> opo(jnp.array([1.0, 5.0]), jnp.array([3, 1]), group_size=2)
    Array([-1.,  3.], dtype=float32)
    """
    scores, m = _groups(scores, valid, group_size)
    weights = masked.keep(lengths.reshape(m.shape).astype(scores.dtype), m)
    used = m & (jnp.sum(weights, axis=-1, keepdims=True) > 0)
    return masked.keep(_centre(scores, m, weights), used).reshape(-1)


def gpg(scores: B, *, group_size: int, valid: Valid = None, axis_name: AxisName = None) -> B:
    """Group policy gradient: α (Rᵢ − mean), α = rows / rows of groups whose scores
    differ (https://arxiv.org/abs/2504.02546).

    α compensates for groups without a gradient. Raises ValueError if the rows are not a
    multiple of group_size.

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
    valid: Valid = None,
    axis_name: AxisName = None,
) -> B:
    """Several rewards, each normalised in its group, summed, then normalised over the
    batch (https://arxiv.org/abs/2601.05242).

    sᵢ = Σᵣ wᵣ (Rᵢᵣ − meanᵣ) / (stdᵣ + eps),  Aᵢ = (sᵢ − mean s) / (std s + eps)

    Both std have ddof = 1. The sum of raw rewards would not tell apart combinations
    with equal sums. Raises ValueError if the rows are not a multiple of group_size.

    >>> x = gdpo(jnp.array([[0.0, 1.0], [1.0, 9.0]]), group_size=2)
    >>> print(jax.device_get(x).round(3))
    [-0.707  0.707]
    """
    normalise = lambda x: group(x, group_size=group_size, eps=eps, valid=valid)
    columns = jnp.stack([normalise(x) for x in scores.T], axis=1)
    summed = jnp.sum(columns if weights is None else columns * weights[None, :], axis=1)
    m = jnp.ones_like(summed, bool) if valid is None else valid
    std = _root(masked.var(summed, m, ddof=1, axis_name=axis_name))
    return masked.keep((summed - masked.mean(summed, m, axis_name=axis_name)) / (std + eps), m)


def last_acting(mask: Mask) -> Bool[Array, "B T"]:
    """True on the last acting token of each row, mₜ = 1 and Σ_{k>t} mₖ = 0. Empty rows
    have none.

    The score of a sequence belongs there, not on the padding after it
    (https://arxiv.org/abs/2403.17031).

    >>> last_acting(jnp.array([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    Array([[False, False,  True, False],
           [False, False, False, False]], dtype=bool)
    """
    m = mask.astype(bool)
    acting_from_here = jax.lax.cumsum(m.astype(jnp.int32), axis=1, reverse=True)
    return m & (acting_from_here == 1)


def _groups(scores: Array, valid: Array | None, group_size: int) -> tuple[Array, Array]:
    """Scores and their mask as [groups, group_size], invalid scores 0."""
    if scores.shape[0] % group_size:
        raise ValueError(f"{scores.shape[0]} rows are not a multiple of group_size {group_size}")
    m = jnp.ones_like(scores, bool) if valid is None else valid.astype(bool)
    return masked.keep(scores, m).reshape(-1, group_size), m.reshape(-1, group_size)


def _count(m: Array, dtype) -> Array:
    return jnp.sum(m, axis=-1, keepdims=True, dtype=dtype)


def _centre(scores: Array, m: Array, weights: Array | None = None) -> Array:
    """Scores minus their group's (weighted) mean."""
    weights = m.astype(scores.dtype) if weights is None else weights
    # Measured from the group's best, equal scores give exactly 0. The rounding error of
    # a mean, divided by a tiny std, is large.
    best = jnp.max(jnp.where(m, scores, -jnp.inf), axis=-1, keepdims=True)
    scores = jnp.where(m, scores - best, 0)
    weight = jnp.sum(weights, axis=-1, keepdims=True)
    weighted = jnp.sum(weights * scores, axis=-1, keepdims=True)
    return scores - weighted / jnp.where(weight > 0, weight, 1)


def _std(difference: Array, m: Array) -> Array:
    squares = jnp.sum(jnp.where(m, jnp.square(difference), 0), axis=-1, keepdims=True)
    return _root(squares / jnp.maximum(_count(m, difference.dtype) - 1, 1))


def _root(x: Array) -> Array:
    """√x with slope 0 at 0, where it is infinite."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
