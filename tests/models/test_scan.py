from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import models
from jaxppo.models import scan
from jaxppo.models.shapes import llama

SHAPE = llama(vocab_size=16, width=16, num_layers=3, num_heads=4, num_kv_heads=2, max_length=32)


@pytest.fixture(scope="module")
def both():
    """(the unrolled model, the scanned one, the same parameters for each)."""
    unrolled, scanned = models.make(SHAPE, lora=2), models.make(SHAPE, lora=2, scan=True)
    params = toys.random_params(unrolled, seed=1)
    return unrolled, scanned, params, scan.stack_layers(params)


def gradient(model, params):
    """Of the sum of sines of the hidden states."""
    prompts = toys.prompts()
    total = lambda params: jnp.sin(model.apply(params, prompts.tokens, prompts.mask)[0]).sum()
    return jax.jit(jax.grad(total))(params)


@pytest.fixture(scope="module")
def unrolled_gradient(both):
    return gradient(both[0], both[2])


def test_scanned_layers_equal_unrolled_ones(both):
    unrolled, scanned, params, stacked = both
    prompts = toys.prompts()
    want, _ = jax.jit(unrolled.apply)(params, prompts.tokens, prompts.mask)
    got, _ = jax.jit(scanned.apply)(stacked, prompts.tokens, prompts.mask)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(
        jnp.shape, jax.eval_shape(scanned.init, jax.random.key(0))
    )


def test_numpy_arrays_stay_on_the_host(both):
    _, _, params, stacked = both
    host = scan.stack_layers(jax.device_get(params))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host))
    toys.assert_same(host, stacked)


@pytest.mark.ci
def test_scanned_layers_that_differ_equal_unrolled_ones():
    """One does not rotate, another has no window and turns more slowly."""
    shape = replace(SHAPE, window=3, window_theta=10.0, no_window=(1,), no_rope=(0,))
    unrolled, scanned = models.make(shape), models.make(shape, scan=True)
    params, prompts = toys.random_params(unrolled, seed=1), toys.prompts()
    want, _ = jax.jit(unrolled.apply)(params, prompts.tokens, prompts.mask)
    got, _ = jax.jit(scanned.apply)(scan.stack_layers(params), prompts.tokens, prompts.mask)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize("remat", ["none", "block", "full"])
def test_gradients_are_equal(both, unrolled_gradient, remat):
    scanned = models.make(SHAPE, lora=2, scan=True, remat=remat)
    got = scan.unstack_layers(gradient(scanned, both[3]))
    # the largest are -74: 3e-6 of one with JAX 0.12
    toys.assert_close(got, unrolled_gradient, atol=2e-4, rtol=1e-5)


@pytest.mark.ci
def test_cached_decoding_equals_the_full_pass(both):
    _, scanned, _, stacked = both
    prompts = toys.ragged([3, 5, 1], 5)
    want, _ = jax.jit(scanned.apply)(stacked, prompts.tokens, prompts.mask)
    cache, parts = scanned.init_cache(3, 5), []
    for start, end in ((0, 3), (3, 4), (4, 5)):
        hidden, cache = jax.jit(scanned.apply)(
            stacked, prompts.tokens[:, start:end], prompts.mask[:, start:end], cache=cache
        )
        parts.append(hidden)
    assert [x.shape for x in cache.keys] == [(3, 2, 5, 4)] * 3  # one array a layer
    np.testing.assert_allclose(
        jnp.concatenate(parts, 1)[prompts.mask], want[prompts.mask], atol=1e-5
    )


def test_unstack_is_the_inverse(both):
    *_, params, stacked = both
    nested = {**params, "critic": params}
    back = scan.unstack_layers(scan.stack_layers(nested))
    assert jax.tree.structure(back) == jax.tree.structure(nested)
    jax.tree.map(np.testing.assert_array_equal, back, nested)
    assert scan.stack_layers({"value": 1}) == scan.unstack_layers({"value": 1}) == {"value": 1}
    assert set(stacked) == {"embed", "layers", "final_norm", "value"}
