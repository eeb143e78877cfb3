"""Faster forms of matrix products, sampling and log-probs. Tests compare each with its
plain form.

XLA uses a CPU's bfloat16 units only if a product accumulates and returns float32 and
both operands are contiguous along the summed dimension. `jax.random.categorical` spends
more time on its V random numbers a row than a small model on its forward pass. The
gradients are custom rules:
https://docs.jax.dev/en/latest/notebooks/Custom_derivative_rules_for_Python_code.html
"""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, Int8

# outside jit, weights may still be NumPy arrays
Matrix = Float[Array, "_ _"] | Float[np.ndarray, "_ _"]
Int8Matrix = Int8[Array, "_ _"] | Int8[np.ndarray, "_ _"]
BLOCK = 256  # tokens in a block of the two-level sampler


def matmul_plain(
    x: Float[Array, "... K"], w: Matrix | Int8Matrix, dtype=jnp.float32, rows: bool = False
) -> Float[Array, "... N"]:
    """y = x @ w, or x @ w.T with `rows`: operands rounded to `dtype`, float32 sums.

    >>> matmul_plain(jnp.ones((1, 2)), jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))
    Array([[2., 4., 6.]], dtype=float32)
    """
    # One dot_general: from x @ w.T, XLA's CPU backend would materialise a transpose.
    contract = (((x.ndim - 1,), (1 if rows else 0,)), ((), ()))
    out = _sum_dtype(x.dtype, dtype)
    return jax.lax.dot_general(
        x.astype(dtype), w.astype(dtype), contract, preferred_element_type=out
    )


def matmul(
    x: Float[Array, "... K"], w: Matrix, dtype=jnp.float32, *, rows: bool = False
) -> Float[Array, "... N"]:
    """`matmul_plain`, y = x @ w, with a fast layout of the weight gradient xᵀ @ dy;
    gradients are rounded like the operands. float64 stays float64.

    >>> matmul(jnp.ones((1, 2)), jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))
    Array([[2., 4., 6.]], dtype=float32)
    """
    return cast(Array, _matmul(x, w, dtype, rows))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, w, dtype, rows):
    return matmul_plain(x, w, dtype, rows)


def _matmul_fwd(x, w, dtype, rows):
    # The rounded operands are half the bytes; the empty arrays hold the original types.
    xs, ws = x.astype(dtype), w.astype(dtype)
    residuals = xs, ws, jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype)
    return matmul_plain(xs, ws, dtype, rows), residuals


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


def matmul_int8(
    x: Float[Array, "... K"],
    w: Int8Matrix,
    scale: Float[Array, "_"] | Float[np.ndarray, "_"],
    dtype=jnp.float32,
) -> Float[Array, "... N"]:
    """y = (x @ w) · scale with a frozen w in 8 bits, which gets no gradient: operands
    rounded to `dtype`, which holds whole numbers up to 127, float32 sums.

    >>> w = jnp.array([[100, 2]], jnp.int8)
    >>> matmul_int8(jnp.ones((1, 1)), w, jnp.array([0.5, 0.25]))
    Array([[50. ,  0.5]], dtype=float32)
    """
    return cast(Array, _matmul_int8(x, w, scale, dtype))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul_int8(x, w, scale, dtype):
    # Tied to x, or XLA would convert all weights before a decode loop, and keep them.
    x, w = jax.lax.optimization_barrier((x, w))
    y = matmul_plain(x, w, dtype)
    return y * jnp.reshape(jnp.asarray(scale), (1,) * (y.ndim - 1) + (-1,))


def _matmul_int8_fwd(x, w, scale, dtype):
    # The 8 bits are kept for the backward pass: rounded weights would be 2 to 4 times
    # the bytes. The empty array holds the type of x.
    return _matmul_int8(x, w, scale, dtype), (w, scale, jnp.zeros((0,), x.dtype))


def _matmul_int8_bwd(dtype, residuals, dy):
    w, scale, like = residuals
    dy, w = jax.lax.optimization_barrier((dy, w))
    dy = dy * jnp.reshape(jnp.asarray(scale), (1,) * (dy.ndim - 1) + (-1,))
    return matmul_plain(dy, w, dtype, rows=True).astype(like.dtype), None, None


_matmul_int8.defvjp(_matmul_int8_fwd, _matmul_int8_bwd)


def _sum_dtype(x_dtype, dtype):
    return jnp.float64 if jnp.float64 in (jnp.dtype(x_dtype), jnp.dtype(dtype)) else jnp.float32


def _transposed(x: Array) -> Array:
    """x.T, row-major on a CPU in 16 bits: XLA's product is then 3 to 6 times faster."""
    if x.dtype.itemsize != 2:
        return x.T
    return jax.lax.platform_dependent(
        x,
        cpu=lambda a: with_layout_constraint(a.T, Layout(major_to_minor=(0, 1))),
        default=lambda a: a.T,
    )


def categorical(logits: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """Sample one token a row from softmax(logits), with one number u in [0, 1) a row. k
    = min {k : Σ_{j ≤ k} p_j > u}, found in two levels: the block of 256 tokens, then
    the token. A token of probability 0 is never chosen. Rows with NaN give any.

    >>> logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]] * 3))
    >>> categorical(logits, jnp.array([0.1, 0.6, 0.99]))
    Array([0, 1, 2], dtype=int32)
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, blocks * BLOCK - vocab))).reshape(rows, blocks, BLOCK)
    upto_block = jnp.cumsum(weights.sum(-1), -1)
    target = uniform * upto_block[:, -1]
    block = _first_above(upto_block, target)
    before = jnp.take_along_axis(upto_block, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0]
    before = jnp.where(block > 0, before, 0.0)
    inside = jnp.cumsum(jnp.take_along_axis(weights, block[:, None, None], 1)[:, 0], -1)
    return (block * BLOCK + _first_above(inside, target - before)).astype(jnp.int32)


def _first_above(cumulative: Float[Array, "B K"], target: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first index above the target; by rounding, the last one with any weight."""
    highest = cumulative[:, -1] * (1 - jnp.finfo(cumulative.dtype).eps)
    return jnp.argmax(cumulative > jnp.minimum(target, highest)[:, None], -1)


@jax.custom_vjp
def token_logprobs(
    logits: Float[Array, "N V"], tokens: Int[Array, "N"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """(log-prob of one token, entropy) of each row of logits.

    log π(k) = z_k − log Σ_j exp z_j,  H = log Σ_j exp z_j − Σ_j π_j z_j
    ∂ log π(k)/∂z = 1_k − π,  ∂H/∂z = −π (log π + H)

    Logits of −inf (forbidden tokens) have π = 0 and no gradient.

    >>> logits = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> logprob, entropy = token_logprobs(logits, jnp.array([1]))
    >>> print(np.asarray([logprob, entropy]).round(4))
    [[-0.2877]
     [ 0.5623]]
    """
    return _token_logprobs_fwd(logits, tokens)[0]


def _token_logprobs_fwd(logits, tokens):
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(-1)
    lse = jnp.log(total) + top[:, 0]
    entropy = lse - (weights * _finite(logits)).sum(-1) / total
    chosen = jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0]
    # Keep the exponentials: to compute them again costs more than to read them.
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
    """Replace −inf by a finite number, so that 0 times it is 0."""
    return jnp.maximum(logits, -1e30)


token_logprobs.defvjp(_token_logprobs_fwd, _token_logprobs_bwd)
