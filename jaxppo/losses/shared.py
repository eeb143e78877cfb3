"""What the policy losses share: types, log-ratios and diagnostics.

Signatures of two lines are laid out by hand (`fmt: skip`): the equation is what counts.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jaxppo import masked
from jaxppo.masked import Mask
from jaxppo.types import BT

CLAMP = 20.0  # e²⁰ is about 5e8: no overflow in float32, even squared
Key = Array | None
Diagnostics = dict[str, BT]
Loss = tuple[BT, Diagnostics]  # (per_token, diagnostics)


def log_ratio(logprobs: BT, old_logprobs: BT, mask: Mask) -> BT:
    """d = logprobs − old_logprobs, clamped to [−20, 20] and 0 where the mask is 0."""
    return jnp.clip(masked.keep(logprobs - old_logprobs, mask), -CLAMP, CLAMP)


def finish(per_token: BT, d: BT, mask: Mask, **indicators: Bool[Array, "B T"]) -> Loss:
    """The loss with 0 at padding, and its diagnostics: each indicator as 0 or 1, and
    KL(old‖new) as eᵈ − 1 − d.
    """
    diagnostics = {
        name: masked.keep(x.astype(per_token.dtype), mask) for name, x in indicators.items()
    }
    diagnostics["approx_kl"] = lax.stop_gradient(masked.keep(jnp.expm1(d) - d, mask))
    return masked.keep(per_token, mask), diagnostics
