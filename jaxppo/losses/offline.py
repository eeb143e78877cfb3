"""Policy losses for data of another policy. Conventions: `jaxppo.losses`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo import masked
from jaxppo.losses.shared import Diagnostics, finish, log_ratio
from jaxppo.masked import Mask
from jaxppo.types import Scalar


def dro(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Mask,
    *,
    beta: Scalar,
    key: Array | None = None,
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """The policy gradient with a quadratic pull: −(A log π − β d² / 2) (https://arxiv.org/abs/2405.19107).

    >>> import jax.numpy as jnp
    >>> lp, old = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, -3.0]])
    >>> dro(lp, old, jnp.ones((1, 2)), jnp.ones((1, 2)), beta=0.5)[0]
    Array([[1., 2.]], dtype=float32)
    """
    d = log_ratio(logprobs, old_logprobs, mask)
    per_token = -masked.keep(advantages, mask) * masked.keep(logprobs, mask) + beta * jnp.square(d) / 2
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
    """Advantage-weighted regression: −min(exp(A / temperature), weight_max) log π (https://arxiv.org/abs/1910.00177).

    The method's own implementation whitens A first. "clip_fraction" counts the tokens at weight_max.

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
