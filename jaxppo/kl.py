"""Estimators of the KL divergence from the policy to a reference, for each token, and
the coefficient's controller.

With x = log π(aₜ) − log π_ref(aₜ) and aₜ sampled from π, k1, k2 and k3 estimate
KL(π‖π_ref) from one sample (http://joschu.net/blog/kl-approx.html). In the reward k1 is
the right one: with returns-to-go it gives the gradient of the divergence of whole
sequences. As a term of the loss only the estimator's own slope counts, in the states
that were visited: k1's is zero on average, k2's that of the reverse KL in each state,
k3's that of the forward KL (https://arxiv.org/abs/2512.21852); that a token changes
which states come later is in none of them. `tests/test_oracle.py` has the exact
expectations.

Nothing here takes a mask: replace what stands at padding before calling
(`masked.keep`), if it may be infinite.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxppo.types import Scalar

CLAMP = 20.0  # e²⁰ is about 5e8: no overflow in float32


def k1(logprobs: Float[Array, "*s"], ref_logprobs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Unbiased, of either sign, high variance: k₁ = x.

    >>> import jax.numpy as jnp
    >>> k1(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]))
    Array([ 1., -1.], dtype=float32)
    """
    return logprobs - ref_logprobs


def k2(logprobs: Float[Array, "*s"], ref_logprobs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Biased, never negative, low variance; as a loss it has the gradient of the
    reverse KL in each state: x² / 2.

    >>> import jax.numpy as jnp
    >>> k2(jnp.array([-1.0, -4.0]), jnp.array([-2.0, -2.0]))
    Array([0.5, 2. ], dtype=float32)
    """
    return jnp.square(logprobs - ref_logprobs) / 2


def k3(logprobs: Float[Array, "*s"], ref_logprobs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Unbiased, never negative, low variance: e⁻ˣ − 1 + x. x is held in [−20, 20], the
    value is not clamped.

    >>> import jax.numpy as jnp, numpy as np
    >>> print(np.asarray(k3(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]))).round(3))
    [0.368 0.718]
    """
    x = jnp.clip(logprobs - ref_logprobs, -CLAMP, CLAMP)
    return jnp.expm1(-x) + x


def absolute(logprobs: Float[Array, "*s"], ref_logprobs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The size of k1: k = |x|, with slope 0 at 0.

    >>> import jax.numpy as jnp
    >>> absolute(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]))
    Array([1., 1.], dtype=float32)
    """
    x = logprobs - ref_logprobs
    return jnp.where(
        x == 0, 0, jnp.abs(x)
    )  # JAX's slope of |x| at 0 is 1, and at the start all x are 0


def straight_through(value: Float[Array, "*s"], gradient: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The value of one estimator with the gradient of another, such as k3 with that of
    k2: sg(v) + g − sg(g).

    >>> import jax, jax.numpy as jnp
    >>> zero = jnp.float32(0)
    >>> jax.value_and_grad(lambda x: straight_through(k1(x, zero), k2(x, zero)))(
    ...     jnp.float32(3)
    ... )
    (Array(3., dtype=float32), Array(3., dtype=float32))
    """
    # The difference is exactly 0, so that the value comes through without a rounding.
    return lax.stop_gradient(value) + (gradient - lax.stop_gradient(gradient))


def full(logits: Float[Array, "*s V"], ref_logits: Float[Array, "*s V"]) -> Float[Array, "*s"]:
    """The exact divergence over the vocabulary: Σᵥ π(v) (log π(v) − log π_ref(v)).
    Tokens with π(v) = 0 add nothing.

    >>> import jax.numpy as jnp, numpy as np
    >>> print(
    ...     np.asarray(
    ...         full(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75])))
    ...     ).round(3)
    ... )
    0.144
    """
    possible = logits > -jnp.inf  # 0 · (−inf − …) would be NaN
    logprobs, ref_logprobs = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
    terms = jnp.exp(logprobs) * (
        jnp.where(possible, logprobs, 0) - jnp.where(possible, ref_logprobs, 0)
    )
    return jnp.sum(terms, axis=-1)


def adapt(
    coef: Scalar, kl: Scalar, *, target: Scalar | int, horizon: Scalar | int, num_rows: Scalar | int
) -> Scalar:
    """One step of the proportional controller: coef · (1 + clip(kl / target − 1, −0.2,
    0.2) · num_rows / horizon).

    `kl` and `target` are in nats for each sequence, a mean over rows: a sum over
    tokens, not a mean (https://arxiv.org/abs/1909.08593, section 2.2).

    >>> print(f"{adapt(0.1, 12.0, target=6.0, horizon=10_000.0, num_rows=64):.6f}")
    0.100128
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return coef * (1 + error * num_rows / horizon)


def adapt_ppo(coef: Scalar, kl: Scalar, *, target: Scalar | int) -> Scalar:
    """PPO's own rule: twice the coefficient where kl > 1.5 target, half of it where kl
    < target / 1.5, else the same.

    From https://arxiv.org/abs/1707.06347, section 4. `kl` and `target` in the same
    unit.

    >>> [float(adapt_ppo(1.0, x, target=1.0)) for x in (0.5, 1.0, 2.0)]
    [0.5, 1.0, 2.0]
    """
    kl = jnp.asarray(kl)
    return coef * jnp.where(kl > 1.5 * target, 2.0, jnp.where(kl < target / 1.5, 0.5, 1.0))
