"""Sum, mean, variance and whitening under a mask: the only statistics in this repository.

What the mask leaves out may be anything, NaN and infinity included: it is replaced by 0 before any arithmetic, so that
values and gradients stay finite. With an `axis_name` numerator and denominator are both summed over the devices first:
a mean of means depends on how the rows are dealt out.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

Mask = Bool[Array, "B T"] | Float[Array, "B T"]  # not zero on the tokens that take part
AxisName = str | tuple[str, ...] | None


def total(
    x: Shaped[Array, "*s"], mask: Shaped[Array, "*s"], axis: int | None = None, axis_name: AxisName = None
) -> Float[Array, "..."]:
    """The sum under the mask: Σ mₜ xₜ.

    Shapes: x and mask alike -> [], or without dimension `axis`.

    >>> import jax.numpy as jnp
    >>> total(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False]))
    Array(3., dtype=float32)
    """
    return _psum(jnp.sum(keep(x, mask), axis=axis), axis_name)


def mean(
    x: Shaped[Array, "*s"], mask: Shaped[Array, "*s"], axis: int | None = None, axis_name: AxisName = None
) -> Float[Array, "..."]:
    """The mean under the mask: Σ mₜ xₜ / Σ mₜ, and 0 where nothing takes part.

    Shapes: x and mask alike -> [], or without dimension `axis`.

    >>> import jax.numpy as jnp
    >>> mean(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False]))
    Array(1.5, dtype=float32)
    """
    kept = keep(x, mask)
    count = _psum(jnp.sum(mask.astype(bool), axis=axis, dtype=kept.dtype), axis_name)
    return _psum(jnp.sum(kept, axis=axis), axis_name) / jnp.maximum(count, 1)


def var(x: Shaped[Array, "*s"], mask: Shaped[Array, "*s"], *, ddof: int = 0, axis_name: AxisName = None) -> Float[Array, ""]:
    """The variance under the mask: Σ mₜ (xₜ − mean)² / (Σ mₜ − ddof), and 0 where ddof leaves nothing to divide by.

    >>> import jax.numpy as jnp
    >>> var(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False]), ddof=1)
    Array(2., dtype=float32)
    """
    kept = keep(x, mask)
    squares = total(jnp.square(kept - mean(x, mask, axis_name=axis_name)), mask, axis_name=axis_name)
    count = _psum(jnp.sum(mask.astype(bool), dtype=kept.dtype), axis_name)
    return jnp.where(count > ddof, squares / jnp.maximum(count - ddof, 1), 0)


def whiten(
    x: Float[Array, "*s"],
    mask: Shaped[Array, "*s"],
    *,
    shift_mean: bool = True,
    ddof: int = 0,
    eps: float = 1e-8,
    axis_name: AxisName = None,
) -> Float[Array, "*s"]:
    """Mean 0 and variance 1 under the mask: (xₜ − mean) / √(var + eps), 0 where the mask is 0.

    Without `shift_mean` the mean is added back, so that only the scale changes (https://arxiv.org/abs/1909.08593).

    >>> import jax.numpy as jnp
    >>> whiten(jnp.array([1.0, 3.0, 9.0]), jnp.array([1.0, 1.0, 0.0]))
    Array([-1.,  1.,  0.], dtype=float32)
    """
    centre = mean(x, mask, axis_name=axis_name)
    white = (keep(x, mask) - centre) * lax.rsqrt(var(x, mask, ddof=ddof, axis_name=axis_name) + eps)
    return keep(white if shift_mean else white + centre, mask)


def keep(x: Shaped[Array, "*s"], mask: Shaped[Array, "*s"]) -> Float[Array, "*s"]:
    """x where the mask is not 0, else 0: for the front of any nonlinearity, where 0 · inf would make a NaN gradient.

    >>> import jax.numpy as jnp
    >>> keep(jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0.0]))
    Array([1., 0.], dtype=float32)
    """
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    return jnp.where(mask.astype(bool), x, 0)


def _psum(x: Array, axis_name: AxisName) -> Array:
    return x if axis_name is None else lax.psum(x, axis_name)
