from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo import aggregate

MASK = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
LOSS = jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 100.0, 100.0], [100.0, 100.0, 100.0, 100.0]])
ALL = {
    "token_mean": aggregate.token_mean,
    "token_sum": aggregate.token_sum,
    "sequence_mean": aggregate.sequence_mean,
    "sequence_sum": aggregate.sequence_sum,
    "constant": partial(aggregate.constant, length=8),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_mean", 22 / 6),  # 1 + 2 + 3 + 4 + 5 + 7 over 6 tokens
        ("token_sum", 22.0),
        ("sequence_mean", 4.25),  # (10 / 4 + 12 / 2) / 2 rows with tokens
        ("sequence_sum", 11.0),  # (10 + 12) / 2
        ("constant", 1.375),  # 11 / 8
    ],
)
def test_values(name, expected):
    for mask in (MASK, MASK.astype(bool)):
        weights = ALL[name](mask)
        np.testing.assert_allclose(jnp.sum(weights * LOSS), expected, rtol=1e-6)
        np.testing.assert_array_equal(jnp.where(MASK > 0, 0, weights), 0.0)


@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_has_weights_of_0(name):
    np.testing.assert_array_equal(ALL[name](jnp.zeros((2, 3))), 0.0)


@pytest.mark.parametrize("name", ALL)
def test_devices_do_not_change_the_weights(name):
    # One row on each of three devices, the last one empty: the sums of the devices add up to the
    # whole.
    split = jax.vmap(partial(ALL[name], axis_name="d"), axis_name="d")(MASK[:, None])
    np.testing.assert_allclose(split[:, 0], ALL[name](MASK), rtol=1e-6)


def test_equal_lengths_make_the_modes_equal():
    # 3 rows of n = 2 tokens in T = 4: up to their factors all are the token mean.
    mask = jnp.tile(jnp.array([1.0, 1.0, 0.0, 0.0]), (3, 1))
    mean = aggregate.token_mean(mask)
    np.testing.assert_allclose(aggregate.sequence_mean(mask), mean, rtol=1e-6)
    np.testing.assert_allclose(aggregate.sequence_sum(mask), 2 * mean, rtol=1e-6)
    np.testing.assert_allclose(aggregate.token_sum(mask), 6 * mean, rtol=1e-6)
    np.testing.assert_allclose(aggregate.constant(mask, length=8), 2 / 8 * mean, rtol=1e-6)


def test_microbatches_need_the_weights_of_the_whole_batch():
    # Rows of 4 and 2 tokens, one to a microbatch: the mean of their token means, (2.5 + 6) / 2 =
    # 4.25, is not 22 / 6.
    weights = aggregate.token_mean(MASK)
    parts = [jnp.sum(weights[i] * LOSS[i]) for i in range(3)]
    np.testing.assert_allclose(sum(parts), 22 / 6, rtol=1e-6)


def test_dtype_and_strictness():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for f in ALL.values():
            for dtype in (jnp.float32, jnp.float64):
                assert jax.eval_shape(f, MASK.astype(dtype)).dtype == dtype
    assert aggregate.token_mean(MASK.astype(bool)).dtype == jnp.float32
