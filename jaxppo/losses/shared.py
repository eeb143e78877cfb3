"""What the policy losses have in common: inputs that are safe at padding, ratios that
are safe to exponentiate.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxppo import masked
from jaxppo.masked import Mask
from jaxppo.types import Scalar

CLAMP = 20.0  # e²⁰ is about 5e8: no overflow in float32, even squared
Diagnostics = dict[str, Float[Array, "B T"]]


def log_ratio(
    logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], mask: Mask
) -> Float[Array, "B T"]:
    """d = logprobs − old_logprobs, held in [−20, 20]; 0 where the mask is 0, in front
    of exp and not after it.
    """
    return jnp.clip(masked.keep(logprobs - old_logprobs, mask), -CLAMP, CLAMP)


def finish(
    per_token: Float[Array, "B T"],
    d: Float[Array, "B T"],
    mask: Mask,
    **indicators: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T"], Diagnostics]:
    """The loss without padding, and its diagnostics: every indicator as 0 or 1, and
    KL(old‖new) as eᵈ − 1 − d.
    """
    diagnostics = {
        name: masked.keep(x.astype(per_token.dtype), mask) for name, x in indicators.items()
    }
    diagnostics["approx_kl"] = lax.stop_gradient(masked.keep(jnp.expm1(d) - d, mask))
    return masked.keep(per_token, mask), diagnostics


def truncated_importance(
    old_logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    mask: Mask,
    *,
    cap: Scalar = 2.0,
) -> Float[Array, "B T"]:
    """A `correction` for a sampler that is not quite the policy: min(π_old / π_sampler,
    cap), a constant, 0 at padding.

    It multiplies per_token (https://fengyao.notion.site/off-policy-rl).

    >>> import jax.numpy as jnp
    >>> old, sampler = (
    ...     jnp.log(jnp.array([[0.5, 0.9, 0.5]])),
    ...     jnp.log(jnp.array([[1.0, 0.1, 1.0]])),
    ... )
    >>> truncated_importance(old, sampler, jnp.array([[1.0, 1.0, 0.0]]))
    Array([[0.5, 2. , 0. ]], dtype=float32)
    """
    ratio = jnp.minimum(jnp.exp(log_ratio(old_logprobs, sampler_logprobs, mask)), cap)
    return lax.stop_gradient(masked.keep(ratio, mask))
