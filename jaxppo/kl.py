"""The KL divergence between the policy and a reference: estimators for each token,
exact divergences over the vocabulary, and controllers of the KL's coefficient
(`control.py` applies them at the end of a step).

With x = log π(aₜ) − log π_ref(aₜ) and aₜ sampled from π, k1, k2 and k3 estimate
KL(π‖π_ref) from one sample (http://joschu.net/blog/kl-approx.html).

- In the reward use k1: with returns-to-go it gives the gradient of the divergence of
  whole sequences.
- In the loss only the estimator's own gradient counts, in the visited states. That of
  k1 is zero on average, that of k2 is the gradient of the reverse KL in each state, and
  that of k3 of the forward KL (https://arxiv.org/abs/2512.21852). None contains the
  effect of a token on later states. `tests/test_oracle.py` has the exact expectations.

Nothing here takes a mask: if values at padding may be infinite, apply `masked.keep`
first.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxppo.types import Scalar

CLAMP = 20.0  # e²⁰ is about 5e8: no overflow in float32
S = Float[Array, "*s"]


def k1(logprobs: S, ref_logprobs: S) -> S:
    """Unbiased, of either sign, high variance: k₁ = x.

    >>> k1(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]))
    Array([ 1., -1.], dtype=float32)
    """
    return logprobs - ref_logprobs


def k2(logprobs: S, ref_logprobs: S) -> S:
    """Biased, never negative, low variance: x² / 2. As a loss it has the gradient of
    the reverse KL in each state.

    >>> k2(jnp.array([-1.0, -4.0]), jnp.array([-2.0, -2.0]))
    Array([0.5, 2. ], dtype=float32)
    """
    return jnp.square(logprobs - ref_logprobs) / 2


def k3(logprobs: S, ref_logprobs: S) -> S:
    """Unbiased, never negative, low variance: e⁻ˣ − 1 + x. x is clamped to [−20, 20],
    the value is not.

    >>> k = k3(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]))
    >>> print(jax.device_get(k).round(3))
    [0.368 0.718]
    """
    x = jnp.clip(logprobs - ref_logprobs, -CLAMP, CLAMP)
    return jnp.expm1(-x) + x


def absolute(logprobs: S, ref_logprobs: S) -> S:
    """The absolute value of k1: k = |x|, with slope 0 at 0.

    >>> absolute(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]))
    Array([1., 1.], dtype=float32)
    """
    x = logprobs - ref_logprobs
    # JAX's slope of |x| at 0 is 1, and all x are 0 at the start.
    return jnp.where(x == 0, 0, jnp.abs(x))


def straight_through(value: S, gradient: S) -> S:
    """The value of one estimator with the gradient of another, such as k3 with that of
    k2: sg(v) + g − sg(g).

    >>> f = lambda x: straight_through(k1(x, jnp.float32(0)), k2(x, jnp.float32(0)))
    >>> jax.value_and_grad(f)(jnp.float32(3))
    (Array(3., dtype=float32), Array(3., dtype=float32))
    """
    # The difference is exactly 0, so the value is not rounded.
    return lax.stop_gradient(value) + (gradient - lax.stop_gradient(gradient))


def full(logits: Float[Array, "*s V"], ref_logits: Float[Array, "*s V"]) -> S:
    """The exact divergence over the vocabulary: Σᵥ π(v) (log π(v) − log π_ref(v)).
    Tokens with π(v) = 0 contribute 0.

    >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
    >>> print(jax.device_get(full(jnp.log(p), jnp.log(q))).round(3))
    0.144
    """
    return _divergence(jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits))


def _divergence(logprobs: Float[Array, "*s V"], other: Float[Array, "*s V"]) -> S:
    """`full` of log-probs."""
    possible = logprobs > -jnp.inf  # 0 · (−inf − …) would be NaN
    difference = jnp.where(possible, logprobs, 0) - jnp.where(possible, other, 0)
    return jnp.sum(jnp.exp(logprobs) * difference, axis=-1)


def forward(logits: Float[Array, "*s V"], ref_logits: Float[Array, "*s V"]) -> S:
    """The other direction of `full`: Σᵥ π_ref(v) (log π_ref(v) − log π(v)). Its
    gradient is that of the cross-entropy with π_ref as soft labels.

    >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
    >>> print(jax.device_get(forward(jnp.log(p), jnp.log(q))).round(3))
    0.131
    """
    return full(ref_logits, logits)


def jensen_shannon(
    logits: Float[Array, "*s V"], ref_logits: Float[Array, "*s V"], *, beta: float = 0.5
) -> S:
    """The generalised Jensen-Shannon divergence of GKD:
    β KL(π_ref‖m) + (1 − β) KL(π‖m), m = β π_ref + (1 − β) π, 0 < β < 1
    (https://arxiv.org/abs/2306.13649, section 2). It is at most log 2. Divided by β it
    nears `forward` for β → 0; divided by 1 − β, `full` for β → 1.

    >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
    >>> print(jax.device_get(jensen_shannon(jnp.log(p), jnp.log(q))).round(3))
    0.034
    """
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
    possible = jnp.maximum(p, q) > -jnp.inf
    known = lambda x: jnp.where(possible, x, 0)  # the sum of two zeros has no gradient
    middle = jnp.logaddexp(known(q) + jnp.log(beta), known(p) + jnp.log1p(-beta))
    return beta * _divergence(q, middle) + (1 - beta) * _divergence(p, middle)


def adapt(coef: Scalar, kl: Scalar, *, target: Scalar, horizon: Scalar, num_rows: Scalar) -> Scalar:
    """One step of the proportional controller: coef · (1 + clip(kl / target − 1, −0.2,
    0.2) · num_rows / horizon) (https://arxiv.org/abs/1909.08593, section 2.2).

    `kl` and `target` are in nats per sequence: a sum over tokens, a mean over rows.

    >>> print(f"{adapt(0.1, 12.0, target=6.0, horizon=10_000.0, num_rows=64):.6f}")
    0.100128
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return coef * (1 + error * num_rows / horizon)


def adapt_ppo(coef: Scalar, kl: Scalar, *, target: Scalar) -> Scalar:
    """PPO's rule: 2 · coef where kl > 1.5 target, coef / 2 where kl < target / 1.5,
    else coef (https://arxiv.org/abs/1707.06347, section 4).

    >>> [float(adapt_ppo(1.0, x, target=1.0)) for x in (0.5, 1.0, 2.0)]
    [0.5, 1.0, 2.0]
    """
    kl = jnp.asarray(kl)
    return coef * jnp.where(kl > 1.5 * target, 2.0, jnp.where(kl < target / 1.5, 0.5, 1.0))
