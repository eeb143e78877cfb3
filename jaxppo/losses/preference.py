"""Losses on pairs of responses, one better than the other. All arguments are sums of
log-probs over tokens, [B].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo.types import Scalar


def dpo(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    ref_chosen: Float[Array, "B"],
    ref_rejected: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> Float[Array, "B"]:
    """Direct preference optimisation: −log σ(β h), h = (π_w − ref_w) − (π_l − ref_l)
    (https://arxiv.org/abs/2305.18290).

    label_smoothing ε > 0: −(1 − ε) log σ(β h) − ε log σ(−β h), for labels that are
    wrong with probability ε.

    >>> import jax.numpy as jnp, numpy as np
    >>> zero = jnp.zeros(2)
    >>> print(np.asarray(dpo(jnp.array([0.0, 10.0]), zero, zero, zero)).round(3))
    [0.693 0.313]
    """
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


def ipo(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    ref_chosen: Float[Array, "B"],
    ref_rejected: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
) -> Float[Array, "B"]:
    """Identity preference optimisation: (h − 1 / (2 β))², h as in `dpo`
    (https://arxiv.org/abs/2310.12036).

    >>> import jax.numpy as jnp
    >>> zero = jnp.zeros(2)
    >>> ipo(jnp.array([5.0, 6.0]), zero, zero, zero)
    Array([0., 1.], dtype=float32)
    """
    return jnp.square((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta))
