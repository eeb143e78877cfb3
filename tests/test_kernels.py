from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo import kernels

DTYPES = [("float32", 1e-5), ("bfloat16", 2e-2)]


def plain_categorical(logits, uniform):
    """The first token whose cumulative probability exceeds u."""
    cumulative = jnp.cumsum(jax.nn.softmax(logits), -1)
    return jnp.argmax(cumulative > uniform[:, None] * cumulative[:, -1:], -1)


def plain_token_logprobs(logits, tokens):
    logprobs = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(logprobs) * jnp.where(jnp.isneginf(logprobs), 0.0, logprobs)).sum(-1)
    return jnp.take_along_axis(logprobs, tokens[:, None], 1)[:, 0], entropy


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_matmul_equals_its_plain_form(dtype, tolerance, rows, strict):
    x, w, dy = normal(2, 3, 8), normal(8, 5) if not rows else normal(5, 8), normal(2, 3, 5)
    dtype = jnp.dtype(dtype)
    tuned, pull = jax.vjp(lambda x, w: kernels.matmul(x, w, dtype, rows=rows), x, w)
    plain, plain_pull = jax.vjp(lambda x, w: kernels.matmul_plain(x, w, dtype, rows), x, w)
    np.testing.assert_allclose(tuned, plain, rtol=tolerance, atol=tolerance)
    for got, want in zip(jax.jit(pull)(dy), plain_pull(dy), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=4 * tolerance)


def test_matmul_by_hand():
    x, w = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 10.0], [3.0, 20.0]])
    assert kernels.matmul(x, w).tolist() == [[7.0, 50.0]]  # 1 + 6, 10 + 40
    assert kernels.matmul(x, w, rows=True).tolist() == [[21.0, 43.0]]  # 1 + 20, 3 + 40
    gradient = jax.grad(lambda w: kernels.matmul(x, w).sum())(w)
    assert gradient.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    gradient = jax.grad(lambda w: kernels.matmul(x, w, rows=True).sum())(w)
    assert gradient.tolist() == [[1.0, 2.0], [1.0, 2.0]]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_matmul_int8_equals_a_product_with_its_numbers(dtype, tolerance):
    """In the backward pass, too; weights in NumPy; the weights get no gradient."""
    w = np.random.default_rng(0).integers(-127, 128, (8, 5)).astype(np.int8)
    x, scale, dy = normal(2, 3, 8), abs(normal(5)) / 127, normal(2, 3, 5)
    dtype = jnp.dtype(dtype)
    tuned, pull = jax.vjp(lambda x: kernels.matmul_int8(x, w, scale, dtype), x)
    plain, plain_pull = jax.vjp(lambda x: x @ (w * scale[None]), x)
    np.testing.assert_allclose(tuned, plain, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(pull(dy)[0], plain_pull(dy)[0], rtol=tolerance, atol=4 * tolerance)
    none = jax.grad(lambda scale: kernels.matmul_int8(x, w, scale, dtype).sum())(scale)
    assert not none.any()


def test_matmul_rounds_its_operands_and_not_its_sums():
    x, w = jnp.array([[1.0 + 2**-12, 256.0]]), jnp.array([[1.0], [1.0]])
    # bfloat16 has 8 bits: 1 + 2^-12 becomes 1; the sum 257 needs 9 and is exact, since it is
    # float32
    assert kernels.matmul(x, w, jnp.bfloat16).tolist() == [[257.0]]
    assert kernels.matmul(x, w, jnp.float32)[0, 0] > 257


def test_matmul_keeps_float64(x64):
    x, w = jnp.ones((2, 3), jnp.float64), jnp.full((3, 4), 1 + 1e-12, jnp.float64)
    out, pull = jax.vjp(lambda x, w: kernels.matmul(x, w, jnp.float64), x, w)
    assert out.dtype == jnp.float64
    assert float(out[0, 0]) == pytest.approx(3 + 3e-12, abs=1e-15)
    assert [g.dtype for g in pull(out)] == [jnp.float64, jnp.float64]


@pytest.mark.ci
@pytest.mark.parametrize("vocab", [1, 3, 256, 300, 1000])
def test_categorical_equals_its_plain_form(vocab, strict):
    logits, uniform = (
        3 * normal(64, vocab),
        jnp.asarray(np.random.default_rng(1).random(64), jnp.float32),
    )
    tuned, plain = (
        jax.jit(kernels.categorical)(logits, uniform),
        plain_categorical(logits, uniform),
    )
    assert tuned.dtype == jnp.int32
    # A number within rounding of a border may fall on either side of it; these do not.
    np.testing.assert_array_equal(tuned, plain)


@pytest.mark.ci
@pytest.mark.parametrize("vocab", [7, 300])
def test_categorical_has_the_right_distribution(vocab):
    n = 200_000
    logits = normal(1, vocab)
    uniform = jax.random.uniform(jax.random.key(0), (n,))
    tokens = jax.jit(kernels.categorical)(jnp.broadcast_to(logits, (n, vocab)), uniform)
    expected = n * np.asarray(jax.nn.softmax(logits[0]), np.float64)
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # mean V − 1, variance 2 (V − 1): five standard deviations
    assert abs(chi2 - (vocab - 1)) < 5 * (2 * (vocab - 1)) ** 0.5


LAST = float(np.nextafter(np.float32(1), np.float32(0)))


@pytest.mark.ci
@pytest.mark.parametrize("uniform", [0.0, 1e-30, 0.5, LAST])
@pytest.mark.parametrize("allowed", [[0], [299], [255, 256], [0, 299], [100, 280]])
def test_categorical_never_samples_a_token_of_probability_0(uniform, allowed):
    logits = (
        jnp.full((1, 300), -jnp.inf).at[0, jnp.array(allowed)].set(jnp.linspace(0, 1, len(allowed)))
    )
    token = int(kernels.categorical(logits, jnp.array([uniform], jnp.float32))[0])
    assert token in allowed
    if uniform == 0.0:
        assert token == allowed[0]
    if uniform == LAST:
        assert token == allowed[-1]


jitted_categorical = jax.jit(kernels.categorical)


@given(st.integers(0, 2**32 - 1))
def test_categorical_on_the_borders(seed):
    """Uniform numbers at the border between two tokens, with many forbidden tokens."""
    rng = np.random.default_rng(seed)
    logits = np.where(
        rng.random((32, 600)) < 0.05, 4 * rng.standard_normal((32, 600)), -np.inf
    ).astype(np.float32)
    logits[:, 5] = 0
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    borders = np.cumsum(weights, -1) / weights.sum(-1, keepdims=True)
    uniform = borders[np.arange(32), rng.integers(0, 600, 32)] + rng.integers(-2, 3, 32) * 2.0**-24
    tokens = jitted_categorical(
        jnp.asarray(logits), jnp.asarray(np.clip(uniform, 0, LAST), jnp.float32)
    )
    assert np.isfinite(logits[np.arange(32), np.asarray(tokens)]).all()


def test_categorical_of_large_logits():
    logits = jnp.array([[1e30, 0.0, -1e30], [-1e30, -1e30, -1e30]])
    assert kernels.categorical(logits, jnp.array([0.999, 0.999])).tolist() == [0, 2]


def test_token_logprobs_equals_its_plain_form(strict):
    logits, tokens = 2 * normal(6, 9), jnp.arange(6)
    for got, want in zip(
        kernels.token_logprobs(logits, tokens), plain_token_logprobs(logits, tokens), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["logprob", "entropy", "both"])
def test_gradients_of_token_logprobs(which):
    logits, tokens = 2 * normal(6, 9).at[2, 4].set(-jnp.inf), jnp.arange(6)
    a, b = {"logprob": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (0.7, -1.3)}[which]
    weights = normal(6, seed=3)

    def total(fn, logits):
        logprob, entropy = fn(logits, tokens)
        return (weights * (a * logprob + b * entropy)).sum()

    tuned = jax.jit(jax.grad(partial(total, kernels.token_logprobs)))(logits)
    allowed = jnp.isfinite(logits)
    # The plain form's gradient is NaN where a logit is −inf: there 0 is right. A large negative
    # number stands in for it.
    plain = jax.grad(partial(total, plain_token_logprobs))(jnp.where(allowed, logits, -1e4))
    np.testing.assert_allclose(tuned, plain, rtol=1e-4, atol=1e-6)
    assert tuned[2, 4] == 0


def test_gradient_of_token_logprobs_by_hand():
    logits = jnp.log(jnp.array([[0.25, 0.75]]))
    gradient = jax.grad(lambda z: kernels.token_logprobs(z, jnp.array([1]))[0].sum())(logits)
    # 1 at the token, minus the probabilities
    np.testing.assert_allclose(gradient, [[-0.25, 0.25]], rtol=1e-6)
    gradient = jax.grad(lambda z: kernels.token_logprobs(z, jnp.array([1]))[1].sum())(logits)
    # −π (log π + H), H = .5623: −.25 (−1.3863 + .5623) = .2060, −.75 (−.2877 + .5623) = −.2060
    np.testing.assert_allclose(gradient, [[0.2060, -0.2060]], atol=1e-4)


def test_token_logprobs_in_float64(x64):
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]], jnp.float64))
    logprob, entropy = kernels.token_logprobs(logits, jnp.array([2]))
    assert logprob.dtype == entropy.dtype == jnp.float64
    assert float(logprob[0]) == pytest.approx(np.log(0.7), abs=1e-14)
    assert (
        jax.grad(lambda z: kernels.token_logprobs(z, jnp.array([2]))[0].sum())(logits).dtype
        == jnp.float64
    )
