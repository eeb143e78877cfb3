"""From scores of whole responses to rewards of tokens."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo import advantages
from jaxppo.types import Rollout, Scalar


def token_rewards(
    scores: Float[Array, "B"], rollout: Rollout, *, kl_coef: Scalar, kl: Callable[[Array, Array], Array]
) -> Float[Array, "B T"]:
    """The score on the last acting token, minus the KL penalty on every acting token (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, eq. 2): r_t = 1[t = last] score − β KL_t.

    Shapes: scores [B] -> [B T], float32 and 0 where nothing was sampled. Rows without a token get nothing.
    """
    mask = rollout.mask
    # The last acting token, not the pad after it; from the mask, since pad may equal the end of text.
    last = advantages.last_acting(mask)
    penalty = jnp.where(mask > 0, kl(rollout.raw_logprobs, rollout.ref_logprobs), 0.0)
    return jnp.where(last, scores[:, None], 0.0).astype(jnp.float32) - kl_coef * penalty


def penalise_missing_eos(scores: Float[Array, "B"], rollout: Rollout, *, penalty: Scalar) -> Float[Array, "B"]:
    """scores − penalty where the response did not end by itself (known from `finished`, never from token ids)."""
    return scores - penalty * (~rollout.finished).astype(scores.dtype)
