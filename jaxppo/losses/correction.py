"""Weights and masks for a sampler that differs from the policy, and for tokens that
teach more than others. All are constants: no gradient passes through them.

The old log-probs are those of the policy before the update (of the scorer), the
sampler's those that the tokens were drawn with. In the formulas r = π_old / π_sampler.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxppo import masked
from jaxppo.losses.shared import CLAMP, log_ratio
from jaxppo.masked import AxisName, Mask
from jaxppo.types import BT, Scalar


def importance(
    old_logprobs: BT,
    sampler_logprobs: BT,
    mask: Mask,
    *,
    level: str = "token",
    rule: str = "truncate",
    low: Scalar = 0.0,
    high: Scalar = 2.0,
    normalise: bool = False,
    axis_name: AxisName = None,
) -> BT:
    """Importance weights w = r, held between two bounds or 0 outside of them; 0 at
    padding. They multiply per_token, and leave denominators as they are.

    Args:
      level: token (r of each token), sequence (Πₜ r, the same on every token of a row)
        or geometric ((Πₜ r)^(1/n)).
      rule: truncate (clip(w, low, high), https://fengyao.notion.site/off-policy-rl) or
        mask (0 unless low ≤ w ≤ high; IcePop, https://arxiv.org/abs/2510.18855).
      normalise: divide by the mean of w over the batch's tokens, for the other levels
        over its rows: a self-normalised estimate
        (https://papers.nips.cc/paper/2015/hash/39027dfad5138c9ca0c474d71db915c3-Abstract.html).

    >>> old, sampler = jnp.array([[0.5, 0.9, 0.5]]), jnp.array([[1.0, 0.1, 1.0]])
    >>> mask = jnp.array([[1.0, 1.0, 0.0]])
    >>> importance(jnp.log(old), jnp.log(sampler), mask)
    Array([[0.5, 2. , 0. ]], dtype=float32)
    """
    d = log_ratio(old_logprobs, sampler_logprobs, mask)
    of = mask
    if level != "token":
        d = {"sequence": masked.total, "geometric": masked.mean}[level](d, mask, axis=1)[:, None]
        d, of = jnp.clip(d, -CLAMP, CLAMP), mask.any(axis=1, keepdims=True)
    w = jnp.exp(d)
    w = {"truncate": jnp.clip(w, low, high), "mask": masked.keep(w, _within(w, low, high))}[rule]
    if normalise:
        mean = masked.mean(w, of, axis_name=axis_name)
        w = w / jnp.where(mean > 0, mean, 1)
    return lax.stop_gradient(masked.keep(jnp.broadcast_to(w, old_logprobs.shape), mask))


def rejection(
    old_logprobs: BT,
    sampler_logprobs: BT,
    mask: Mask,
    *,
    estimator: str = "k1",
    over: str = "token",
    low: Scalar | None = None,
    high: Scalar | None = None,
) -> BT:
    """The mask without tokens or rows whose estimate of KL(sampler‖old) is out of
    bounds (https://arxiv.org/abs/2512.23075). It replaces the mask, so denominators
    count what is kept.

    Args:
      estimator: k1 (log r; its bounds are ratios, on r, Πₜ r or its n-th root) or k3
        (r − 1 − log r; its bounds are nats).
      over: token, row_sum, row_mean, or row_max, which keeps a row if all of its tokens
        are within the bounds.

    >>> old, sampler = jnp.array([[0.5, 0.9]]), jnp.array([[0.4, 0.1]])
    >>> rejection(jnp.log(old), jnp.log(sampler), jnp.ones((1, 2)), low=0.5, high=2.0)
    Array([[1., 0.]], dtype=float32)
    """
    d = log_ratio(old_logprobs, sampler_logprobs, mask)
    x = {"k1": d, "k3": jnp.expm1(d) - d}[estimator]
    if over in ("row_sum", "row_mean"):
        x = (masked.total if over == "row_sum" else masked.mean)(x, mask, axis=1)[:, None]
    value = jnp.exp(jnp.clip(x, -CLAMP, CLAMP)) if estimator == "k1" else x
    inside = _within(value, -jnp.inf if low is None else low, jnp.inf if high is None else high)
    if over == "row_max":
        inside = (inside | ~mask.astype(bool)).all(axis=1, keepdims=True)
    return _as_mask(inside, mask, d)


def off_policy_mask(
    logprobs: BT, sampler_logprobs: BT, advantages: BT, mask: Mask, *, threshold: Scalar
) -> BT:
    """0 on rows with a negative advantage that the policy has left: meanₜ (log
    π_sampler − log π) > threshold (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556).

    It multiplies per_token, and leaves denominators as they are. A row's advantage is
    the masked mean of its tokens'.

    >>> lp, sampler = jnp.array([[-2.0], [-2.0]]), jnp.array([[-1.0], [-1.0]])
    >>> a = jnp.array([[1.0], [-1.0]])
    >>> off_policy_mask(lp, sampler, a, jnp.ones((2, 1)), threshold=0.5).tolist()
    [[1.0], [0.0]]
    """
    far = masked.mean(sampler_logprobs - logprobs, mask, axis=1) > threshold
    keep = ~far | (masked.mean(advantages, mask, axis=1) >= 0)
    return _as_mask(keep[:, None], mask, logprobs)


def top_entropy(entropy: BT, mask: Mask, *, fraction: Scalar, axis_name: AxisName = None) -> BT:
    """1 on the fraction of the batch's tokens with the highest entropy
    (https://arxiv.org/abs/2506.01939): H ≥ its (1 − fraction)-quantile.

    Equal entropies count alike. It multiplies per_token, and leaves denominators as
    they are.

    >>> h = jnp.array([[0.1, 2.0, 1.0], [3.0, 0.0, 9.0]])
    >>> mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    >>> top_entropy(h, mask, fraction=0.4)
    Array([[0., 1., 0.],
           [1., 0., 0.]], dtype=float32)
    """
    least = masked.quantile(entropy, mask, 1 - fraction, axis_name=axis_name)
    # Responses to one prompt begin in one state: their first entropies differ by
    # rounding alone, which must not decide.
    return _as_mask(entropy >= least - 1e-5, mask, entropy)


def _within(x: Array, low: Scalar, high: Scalar) -> Array:
    return (x >= low) & (x <= high)


def _as_mask(inside: Array, mask: Array, like: Array) -> Array:
    """1 where the mask is not 0 and it holds, else 0."""
    return (mask.astype(bool) & inside).astype(like.dtype)
