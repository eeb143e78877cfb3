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
    return unrolled, scanned, params, scan.stack(params)


def test_scanned_layers_are_the_unrolled_ones(both):
    unrolled, scanned, params, stacked = both
    prompts = toys.prompts()
    want, _ = unrolled.apply(params, prompts.tokens, prompts.mask)
    got, _ = scanned.apply(stacked, prompts.tokens, prompts.mask)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(
        jnp.shape, jax.eval_shape(scanned.init, jax.random.key(0))
    )


def test_what_is_on_the_host_is_stacked_there(both):
    _, _, params, stacked = both
    host = scan.stack(jax.device_get(params))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host))
    toys.assert_same(host, stacked)


@pytest.mark.parametrize("remat", ["none", "block", "full"])
def test_gradients_are_the_same(both, remat):
    unrolled, _, params, stacked = both
    scanned = models.make(SHAPE, lora=2, scan=True, remat=remat)
    prompts = toys.prompts()
    loss = lambda model: (
        lambda params: jnp.sin(model.apply(params, prompts.tokens, prompts.mask)[0]).sum()
    )
    want, got = jax.grad(loss(unrolled))(params), jax.grad(loss(scanned))(stacked)
    toys.assert_close(
        scan.unstack(got), want, atol=2e-4, rtol=1e-5
    )  # the largest are -74: 3e-6 of one with JAX 0.12


def test_decoding_with_a_cache_is_the_whole_pass(both):
    _, scanned, _, stacked = both
    prompts = toys.ragged([3, 5, 1], 5)
    want, _ = scanned.apply(stacked, prompts.tokens, prompts.mask)
    cache, parts = scanned.init_cache(3, 5), []
    for start, end in ((0, 3), (3, 4), (4, 5)):
        hidden, cache = scanned.apply(
            stacked, prompts.tokens[:, start:end], prompts.mask[:, start:end], cache=cache
        )
        parts.append(hidden)
    assert cache.keys.shape == (3, 3, 2, 5, 4)
    np.testing.assert_allclose(
        jnp.concatenate(parts, 1)[prompts.mask], want[prompts.mask], atol=1e-5
    )


def test_unstack_is_the_inverse(both):
    *_, params, stacked = both
    nested = {**params, "critic": params}
    back = scan.unstack(scan.stack(nested))
    assert jax.tree.structure(back) == jax.tree.structure(nested)
    jax.tree.map(np.testing.assert_array_equal, back, nested)
    assert scan.stack({"value": 1}) == scan.unstack({"value": 1}) == {"value": 1}
    assert set(stacked) == {"embed", "layers", "final_norm", "value"}
