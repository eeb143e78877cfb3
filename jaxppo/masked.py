"""Sum, mean, variance, quantile, whitening and running moments under a mask. All
statistics of a batch use these functions.

Values outside the mask may be NaN or infinite: they are replaced by 0 before any
arithmetic. With `axis_name`, numerator and denominator are both summed over the devices
first. https://docs.jax.dev/en/latest/faq.html#gradients-contain-nan-where-using-where
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from jaxppo.types import BT, Scalar

Mask = Bool[Array, "B T"] | BT  # not zero on the tokens that take part
AxisName = str | tuple[str, ...] | None
S = Shaped[Array, "*s"]


def total(
    x: S, mask: S, axis: int | None = None, axis_name: AxisName = None
) -> Float[Array, "..."]:
    """The sum under the mask: Σ mₜ xₜ.

    >>> total(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False]))
    Array(3., dtype=float32)
    """
    return _psum(jnp.sum(keep(x, mask), axis=axis), axis_name)


def mean(x: S, mask: S, axis: int | None = None, axis_name: AxisName = None) -> Float[Array, "..."]:
    """The mean under the mask, Σ mₜ xₜ / Σ mₜ, and 0 where the mask is empty. The mean
    of equal numbers is exactly that number: a tiny variance would give huge advantages.

    >>> mean(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False]))
    Array(1.5, dtype=float32)
    """
    kept, taken = keep(x, mask), mask.astype(bool)
    count = _psum(jnp.sum(taken, axis=axis, dtype=kept.dtype), axis_name)
    fixed = lax.stop_gradient(kept)
    # any of the numbers would do as the pivot
    pivot = jnp.max(fixed, axis=axis, keepdims=True, initial=-jnp.inf, where=taken)
    pivot = pivot if axis_name is None else lax.pmax(pivot, axis_name)
    pivot = jnp.where(jnp.isfinite(pivot), pivot, 0)
    rest = _psum(jnp.sum(keep(kept - pivot, mask), axis=axis), axis_name) / jnp.maximum(count, 1)
    return jnp.where(count > 0, pivot.reshape(rest.shape) + rest, 0)


def var(x: S, mask: S, *, ddof: int = 0, axis_name: AxisName = None) -> Float[Array, ""]:
    """Σ mₜ (xₜ − mean)² / (Σ mₜ − ddof), and 0 for a denominator of 0 or less.

    >>> var(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False]), ddof=1)
    Array(2., dtype=float32)
    """
    kept = keep(x, mask)
    distance = kept - mean(x, mask, axis_name=axis_name)
    squares = total(jnp.square(distance), mask, axis_name=axis_name)
    count = _psum(jnp.sum(mask.astype(bool), dtype=kept.dtype), axis_name)
    return jnp.where(count > ddof, squares / jnp.maximum(count - ddof, 1), 0)


def whiten(
    x: Float[Array, "*s"],
    mask: S,
    *,
    shift_mean: bool = True,
    ddof: int = 0,
    eps: float = 1e-8,
    axis_name: AxisName = None,
) -> Float[Array, "*s"]:
    """(xₜ − mean) / √(var + eps) under the mask, else 0. Without `shift_mean` the mean
    is added back (https://arxiv.org/abs/1909.08593).

    >>> whiten(jnp.array([1.0, 3.0, 9.0]), jnp.array([1.0, 1.0, 0.0]))
    Array([-1.,  1.,  0.], dtype=float32)
    """
    white = whiten_as(
        keep(x, mask), x, mask, shift_mean=shift_mean, ddof=ddof, eps=eps, axis_name=axis_name
    )
    return keep(white, mask)


def whiten_as(
    y: Float[Array, "*t"],
    x: Float[Array, "*s"],
    mask: S,
    *,
    shift_mean: bool = True,
    ddof: int = 0,
    eps: float = 1e-8,
    axis_name: AxisName = None,
) -> Float[Array, "*t"]:
    """Whiten y with the statistics of x: (y − mean(x)) / √(var(x) + eps).

    >>> x = jnp.array([1.0, 3.0])  # mean 2, deviation 1
    >>> whiten_as(jnp.array([6.0]), x, jnp.ones(2))
    Array([4.], dtype=float32)
    """
    centre = mean(x, mask, axis_name=axis_name)
    white = (y - centre) * lax.rsqrt(var(x, mask, ddof=ddof, axis_name=axis_name) + eps)
    return white if shift_mean else white + centre


def quantile(x: S, mask: S, q: Scalar, *, axis_name: AxisName = None) -> Float[Array, ""]:
    """The q-quantile under the mask, linear between neighbours in order: xᵢ + (p − i)
    (xᵢ₊₁ − xᵢ), p = q (n − 1), i = ⌊p⌋; 0 where the mask is empty.

    >>> quantile(jnp.array([3.0, 1.0, jnp.inf]), jnp.array([1.0, 1.0, 0.0]), 0.25)
    Array(1.5, dtype=float32)
    """
    kept = jnp.where(mask.astype(bool), x, jnp.nan)
    everywhere = kept if axis_name is None else lax.all_gather(kept, axis_name)
    return jnp.nan_to_num(jnp.nanquantile(everywhere, q))


class Moments(NamedTuple):
    """Running count, mean and sum of squared distances from the mean."""

    count: Float[Array, ""]
    mean: Float[Array, ""]
    squares: Float[Array, ""]

    def std(self, *, ddof: int = 1) -> Float[Array, ""]:
        """√(squares / (count − ddof)), and 1 where the count is too small or the
        deviation is below a millionth of the mean (float32 rounding).
        """
        variance = self.squares / jnp.maximum(self.count - ddof, 1)
        spread = (self.count > ddof) & (variance > jnp.square(1e-6 * self.mean))
        return jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1)), 1)


def no_moments() -> Moments:
    """The moments of an empty set: n = m = S = 0.

    >>> float(no_moments().std())
    1.0
    """
    return Moments(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def add_moments(moments: Moments, x: S, mask: S, *, axis_name: AxisName = None) -> Moments:
    """The moments with the batch x added: n = n₁ + n₂, m = m₁ + δ n₂ / n, S = S₁ + S₂ +
    δ² n₁ n₂ / n, δ = m₂ − m₁
    (http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf).

    >>> ones = jnp.ones(2, bool)
    >>> one = add_moments(no_moments(), jnp.array([1.0, 3.0]), ones)
    >>> both = add_moments(one, jnp.array([5.0, 7.0]), ones)
    >>> float(both.mean), round(float(both.std()) ** 2, 4)  # (9 + 1 + 1 + 9) / 3
    (4.0, 6.6667)
    """
    count = _psum(jnp.sum(mask.astype(bool), dtype=jnp.float32), axis_name)
    centre = mean(x, mask, axis_name=axis_name)
    squares = var(x, mask, axis_name=axis_name) * count
    n = moments.count + count
    delta, share = centre - moments.mean, count / jnp.maximum(n, 1)
    squares = moments.squares + squares + jnp.square(delta) * moments.count * share
    return Moments(n, moments.mean + delta * share, squares)


def keep(x: S, mask: S) -> Float[Array, "*s"]:
    """yₜ = xₜ where mₜ is not 0, else 0; 0 · inf would make a NaN gradient.

    >>> keep(jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0.0]))
    Array([1., 0.], dtype=float32)
    """
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    return jnp.where(mask.astype(bool), x, 0)


def _psum(x: Array, axis_name: AxisName) -> Array:
    return x if axis_name is None else lax.psum(x, axis_name)
