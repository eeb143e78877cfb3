import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo import masked

X = jnp.array([[1.0, 2.0, 6.0], [5.0, jnp.nan, jnp.inf]])
MASK = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


def test_total_and_mean():
    assert masked.total(X, MASK) == 14.0  # 1 + 2 + 6 + 5
    assert masked.mean(X, MASK) == 3.5  # 14 / 4
    np.testing.assert_array_equal(masked.total(X, MASK, axis=1), [9.0, 5.0])
    np.testing.assert_array_equal(masked.mean(X, MASK, axis=1), [3.0, 5.0])  # 9 / 3, 5 / 1


def test_variance():
    # (2.5² + 1.5² + 2.5² + 1.5²) = 17
    assert masked.var(X, MASK) == 17 / 4
    np.testing.assert_allclose(masked.var(X, MASK, ddof=1), 17 / 3, rtol=1e-6)


def test_quantile():
    # Of 1, 2, 4, 8: position 0.5 · 3 = 1.5, between 2 and 4; the ends; over devices, and of nothing
    x = jnp.array([[4.0, 1.0, jnp.inf], [8.0, 2.0, jnp.nan]])
    mask = jnp.array([[True, True, False], [True, True, False]])
    assert [float(masked.quantile(x, mask, q)) for q in (0.0, 0.5, 1.0)] == [1.0, 3.0, 8.0]
    split = jax.vmap(lambda x, m: masked.quantile(x, m, 0.5, axis_name="d"), axis_name="d")
    np.testing.assert_array_equal(split(x, mask), [3.0, 3.0])
    assert float(masked.quantile(x, jnp.zeros_like(mask), 0.5)) == 0.0


@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten(ddof):
    white = masked.whiten(X, MASK, ddof=ddof)
    assert abs(float(masked.mean(white, MASK))) < 1e-6
    np.testing.assert_allclose(masked.var(white, MASK, ddof=ddof), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(white[1, 1:], 0.0)
    # Without the shift the mean stays.
    unshifted = masked.whiten(X, MASK, ddof=ddof, shift_mean=False)
    np.testing.assert_allclose(masked.mean(unshifted, MASK), 3.5, rtol=1e-6)
    np.testing.assert_allclose(masked.keep(unshifted - 3.5, MASK), white, atol=1e-6)


def test_empty_masks_and_single_values():
    nothing, one = jnp.zeros((2, 3)), jnp.zeros((2, 3)).at[0, 1].set(1.0)
    assert masked.mean(X, nothing) == 0.0 and masked.var(X, nothing) == 0.0
    np.testing.assert_array_equal(masked.whiten(X, nothing, ddof=1), 0.0)
    # n = ddof = 1 leaves nothing to divide by; the only value is the mean.
    assert masked.var(X, one, ddof=1) == 0.0
    np.testing.assert_array_equal(masked.whiten(X, one, ddof=1), 0.0)
    np.testing.assert_array_equal(masked.mean(X, nothing, axis=1), [0.0, 0.0])


def test_gradients_stay_finite_next_to_nan():
    for f in (
        masked.total,
        masked.mean,
        masked.var,
        lambda x, m: jnp.sum(masked.whiten(x, m) ** 3),
    ):
        gradient = jax.grad(f)(X, MASK)
        assert np.isfinite(gradient).all() and (gradient[1, 1:] == 0).all()


@pytest.mark.parametrize("f", [masked.total, masked.mean, masked.var, masked.whiten])
def test_devices_do_not_change_statistics(f):
    # The first device has three tokens and the second one: a mean of means would be (3 + 5) / 2.
    split = jax.vmap(lambda x, m: f(x, m, axis_name="d"), axis_name="d")(X, MASK)
    whole = f(X, MASK)
    np.testing.assert_allclose(split, jnp.broadcast_to(whole, split.shape), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("mask_dtype", [bool, jnp.float32])
def test_dtype_is_kept(dtype, mask_dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x, mask = jnp.ones((2, 3), dtype), jnp.ones((2, 3), mask_dtype)
        for f in (masked.total, masked.mean, masked.var, masked.whiten):
            assert jax.eval_shape(f, x, mask).dtype == dtype


def test_integers_are_summed_as_floats():
    assert masked.mean(jnp.array([1, 2]), jnp.array([True, True])) == 1.5
    assert masked.mean(jnp.array([True, False]), jnp.array([True, True])) == 0.5


@pytest.mark.ci
@pytest.mark.parametrize("value", [0.1, -1.0, 1.1, 100.1, 3e-7])
@pytest.mark.parametrize("rows", [3, 48, 63, 64 * 53])
def test_equal_numbers_have_no_variance(value, rows):
    """Their mean is exactly that number. With rounding, the running deviation would be the last
    digit, and a reward divided by it millions.
    """
    mask = jnp.arange(rows) != 1
    x = jnp.where(mask, jnp.float32(value), jnp.nan)

    @jax.jit
    def numbers(x):
        first = masked.add_moments(masked.no_moments(), x, mask)
        return (
            masked.mean(x, mask),
            masked.var(x, mask),
            masked.whiten(x, mask),
            masked.add_moments(first, x, mask).std(),
        )

    mean, var, white, std = numbers(x)
    assert (mean, var, std) == (jnp.float32(value), 0, 1)
    assert not white.any()


def test_rounding_is_not_counted_as_variance():
    """1 and 1 + 2⁻²³ differ by rounding only; 1 and 1.001 differ."""
    two = lambda x: masked.add_moments(
        masked.no_moments(), jnp.array([1.0, x]), jnp.ones(2, bool)
    ).std()
    assert two(1 + 2**-23) == 1
    assert two(1.001) == pytest.approx(0.001 / 2**0.5, rel=1e-3)


def test_whiten_as_uses_the_other_statistics():
    """1 and 3 have mean 2 and deviation 1."""
    x, mask = jnp.array([1.0, 3.0, 99.0]), jnp.array([1.0, 1.0, 0.0])
    np.testing.assert_allclose(
        masked.whiten_as(jnp.array([[2.0, 6.0]]), x, mask), [[0.0, 4.0]], atol=1e-6
    )
    np.testing.assert_allclose(
        masked.whiten_as(x, x, mask, shift_mean=False)[:2], [1.0, 3.0], atol=1e-6
    )
