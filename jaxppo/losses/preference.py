"""Losses on pairs of responses, one preferred over the other. Arguments are sums of
log-probs over tokens, [B].
"""

import jax
import jax.numpy as jnp

from jaxppo.types import B, Scalar


def dpo(chosen: B, rejected: B, ref_chosen: B, ref_rejected: B, *,
        beta: Scalar = 0.1, label_smoothing: Scalar = 0.0) -> B:  # fmt: skip
    """Direct preference optimisation: −log σ(β h), h = (π_w − ref_w) − (π_l − ref_l)
    (https://arxiv.org/abs/2305.18290).

    label_smoothing ε > 0: −(1 − ε) log σ(β h) − ε log σ(−β h), for labels that are
    wrong with probability ε.

    >>> zero = jnp.zeros(2)
    >>> print(jax.device_get(dpo(jnp.array([0.0, 10.0]), zero, zero, zero)).round(3))
    [0.693 0.313]
    """
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


def ipo(chosen: B, rejected: B, ref_chosen: B, ref_rejected: B, *, beta: Scalar = 0.1) -> B:
    """Identity preference optimisation: (h − 1 / (2 β))², h as in `dpo`
    (https://arxiv.org/abs/2310.12036).

    >>> zero = jnp.zeros(2)
    >>> ipo(jnp.array([5.0, 6.0]), zero, zero, zero)
    Array([0., 1.], dtype=float32)
    """
    return jnp.square((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta))
