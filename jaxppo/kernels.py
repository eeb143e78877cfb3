"""Single operations, tuned: each beside its plain form, with a test that the two agree.
Nothing here knows of models or losses.

What it is worth was measured on CPUs with AVX-512 and bfloat16 units
(`experiments/benchmarks/step.py` measures the whole): XLA reaches the bfloat16 units
only if a product accumulates and returns float32 and both operands lie along the summed
dimension, and `jax.random.categorical` spends more on its V random numbers a row than a
small model on its forward pass.

Their derivatives are rules of their own:
https://docs.jax.dev/en/latest/notebooks/Custom_derivative_rules_for_Python_code.html
"""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

Matrix = (
    Float[Array, "_ _"] | Float[np.ndarray, "_ _"]
)  # outside of jit, weights may still be as they were loaded
BLOCK = 256  # tokens in a block of the two-level sampler


def matmul_plain(
    x: Float[Array, "... K"], w: Matrix, dtype=jnp.float32, rows: bool = False
) -> Float[Array, "... N"]:
    """x @ w with operands rounded to `dtype` and sums in float32; with `rows`, w is [N
    K] and the product x @ w.T.

    >>> import jax.numpy as jnp
    >>> matmul_plain(jnp.ones((1, 2)), jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))
    Array([[2., 4., 6.]], dtype=float32)
    """
    # As one dot_general: XLA's CPU backend would write out a transpose of its own.
    contract = (((x.ndim - 1,), (1 if rows else 0,)), ((), ()))
    out = _sum_dtype(x.dtype, dtype)
    return jax.lax.dot_general(
        x.astype(dtype), w.astype(dtype), contract, preferred_element_type=out
    )


def matmul(
    x: Float[Array, "... K"], w: Matrix, dtype=jnp.float32, *, rows: bool = False
) -> Float[Array, "... N"]:
    """`matmul_plain`, y = x @ w, whose weight gradient xᵀ @ dy is laid out for the fast
    path.

    Shapes: x [... K], w [K N], or [N K] with `rows` -> [... N] in float32 (float64
    stays float64). The gradients are rounded like the operands.

    >>> import jax.numpy as jnp
    >>> matmul(jnp.ones((1, 2)), jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))
    Array([[2., 4., 6.]], dtype=float32)
    """
    return cast(Array, _matmul(x, w, dtype, rows))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, w, dtype, rows):
    return matmul_plain(x, w, dtype, rows)


def _matmul_fwd(x, w, dtype, rows):
    # The rounded operands are kept: the backward pass reads half the bytes and does not
    # round again.
    xs, ws = x.astype(dtype), w.astype(dtype)
    return matmul_plain(xs, ws, dtype, rows), (
        xs,
        ws,
        jnp.zeros((0,), x.dtype),
        jnp.zeros((0,), w.dtype),
    )


def _matmul_bwd(dtype, rows, residuals, dy):
    x, w, x_like, w_like = residuals
    out = _sum_dtype(dy.dtype, dtype)
    dy = dy.astype(dtype)
    dx = matmul_plain(dy, w, dtype, not rows).astype(out)
    xs, dys = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    left, right = (dys, xs) if rows else (xs, dys)
    dw = jax.lax.dot_general(
        _transposed(left), right, (((1,), (0,)), ((), ())), preferred_element_type=out
    )
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _sum_dtype(x_dtype, dtype):
    """float64 for float64, else float32."""
    return jnp.float64 if jnp.float64 in (jnp.dtype(x_dtype), jnp.dtype(dtype)) else jnp.float32


def _transposed(x: Array) -> Array:
    """x.T, on a CPU in 16 bits written out row-major: XLA's product is 3 to 6 times
    faster so; in 32 bits the copy is wasted.
    """
    if x.dtype.itemsize != 2:
        return x.T
    return jax.lax.platform_dependent(
        x,
        cpu=lambda a: with_layout_constraint(a.T, Layout(major_to_minor=(0, 1))),
        default=lambda a: a.T,
    )


def pick_plain(logits: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """Inverse transform sampling, the first token whose cumulative probability exceeds
    u: min {k : Σ_{j ≤ k} p_j > u}.

    >>> import jax.numpy as jnp
    >>> pick_plain(jnp.log(jnp.array([[0.2, 0.5, 0.3]] * 3)), jnp.array([0.1, 0.6, 0.99]))
    Array([0, 1, 2], dtype=int32)
    """
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    cumulative = jnp.cumsum(weights, -1)
    return jnp.argmax(cumulative > uniform[:, None] * cumulative[:, -1:], -1).astype(jnp.int32)


def pick(logits: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """One token a row, with probability softmax(logits), from ONE uniform number in [0,
    1) a row.

    k = min {k : Σ_{j ≤ k} p_j > u}, found in two levels: the block of 256 tokens by
    block sums, then the token in the block. A token of probability 0 is never chosen.
    Rows with NaN give a token; the caller checks for them.

    >>> import jax.numpy as jnp
    >>> pick(jnp.log(jnp.array([[0.2, 0.5, 0.3]] * 3)), jnp.array([0.1, 0.6, 0.99]))
    Array([0, 1, 2], dtype=int32)
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, blocks * BLOCK - vocab))).reshape(rows, blocks, BLOCK)
    upto_block = jnp.cumsum(weights.sum(-1), -1)
    target = uniform * upto_block[:, -1]
    # Rounding may leave no block or token above the target: then the last one with any
    # weight is the right answer.
    block = _first_above(upto_block, target)
    before = jnp.where(
        block > 0, jnp.take_along_axis(upto_block, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0
    )
    inside = jnp.cumsum(jnp.take_along_axis(weights, block[:, None, None], 1)[:, 0], -1)
    return (block * BLOCK + _first_above(inside, target - before)).astype(jnp.int32)


def _first_above(cumulative: Float[Array, "B K"], target: Float[Array, "B"]) -> Int[Array, "B"]:
    above = (
        cumulative
        > jnp.minimum(target, cumulative[:, -1] * (1 - jnp.finfo(cumulative.dtype).eps))[:, None]
    )
    return jnp.argmax(above, -1)


def token_logprobs_plain(
    logits: Float[Array, "N V"], tokens: Int[Array, "N"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """(log softmax(logits)[token], entropy) of each row: log π(k) and H = −Σ_j π_j log
    π_j.

    >>> import jax.numpy as jnp
    >>> logprob, entropy = token_logprobs_plain(
    ...     jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([1])
    ... )
    >>> (
    ...     round(float(logprob[0]), 4),
    ...     round(float(entropy[0]), 4),
    ... )  # log .75, -.25 log .25 - .75 log .75
    (-0.2877, 0.5623)
    """
    logprobs = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(logprobs) * jnp.where(jnp.isneginf(logprobs), 0.0, logprobs)).sum(-1)
    return jnp.take_along_axis(logprobs, tokens[:, None], 1)[:, 0], entropy


@jax.custom_vjp
def token_logprobs(
    logits: Float[Array, "N V"], tokens: Int[Array, "N"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Log-prob of one token and entropy of each row of logits. For the gradient the
    logits and their exponentials are kept.

    log π(k) = z_k − log Σ_j exp z_j,  H = log Σ_j exp z_j − Σ_j π_j z_j;
    ∂ log π(k)/∂z = 1_k − π,  ∂H/∂z = −π (log π + H). Logits of −inf (tokens not allowed) have π = 0 and no gradient.

    Shapes: logits [N V], tokens Int[N] -> ([N], [N]).

    >>> import jax.numpy as jnp
    >>> logprob, entropy = token_logprobs(
    ...     jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([1])
    ... )
    >>> (
    ...     round(float(logprob[0]), 4),
    ...     round(float(entropy[0]), 4),
    ... )  # log .75, -.25 log .25 - .75 log .75
    (-0.2877, 0.5623)
    """
    return _token_logprobs_fwd(logits, tokens)[0]


def _token_logprobs_fwd(logits, tokens):
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(-1)
    lse = jnp.log(total) + top[:, 0]
    mean = (weights * _finite(logits)).sum(-1) / total
    entropy = lse - mean
    chosen = jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0]
    # The exponentials are kept: another pass of them would cost more than reading them
    # back.
    return (chosen - lse, entropy), (logits, weights, tokens, total, lse, entropy)


def _token_logprobs_bwd(residuals, cotangents):
    logits, weights, tokens, total, lse, entropy = residuals
    d_logprob, d_entropy = cotangents
    logp = _finite(logits) - lse[:, None]
    p = weights * (1 / total)[:, None]
    hit = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, 1) == tokens[:, None]
    grad = jnp.where(hit, d_logprob[:, None], 0.0) - p * (
        d_logprob[:, None] + d_entropy[:, None] * (logp + entropy[:, None])
    )
    return grad, None


def _finite(logits: Array) -> Array:
    """−inf becomes a number, so that a probability of 0 times it is 0."""
    return jnp.maximum(logits, -1e30)


token_logprobs.defvjp(_token_logprobs_fwd, _token_logprobs_bwd)
