import jax.numpy as jnp
import numpy as np

from jaxppo.models import layers


def test_norms_by_hand():
    x = jnp.array([[1.0, 3.0]])
    rms = layers.Norm("rms", 0.0).apply({"params": {"scale": jnp.array([1.0, 2.0])}}, x)
    # mean square (1 + 9) / 2 = 5
    np.testing.assert_allclose(rms, [[1 / 5**0.5, 6 / 5**0.5]], rtol=1e-6)
    params = {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.5, 0.0])}
    layer = layers.Norm("layer", 0.0).apply({"params": params}, x)
    np.testing.assert_allclose(layer, [[-0.5, 2.0]], rtol=1e-6)  # mean 2, deviation 1


def test_adapters_by_hand():
    linear = layers.Linear(2, rank=1, alpha=4.0)
    params = {
        "kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]]),
        "lora_a": jnp.array([[1.0], [2.0]]),
        "lora_b": jnp.array([[10.0, 100.0]]),
    }
    out = linear.apply({"params": params}, jnp.array([[3.0, 5.0]]))
    # x A = 3 + 10 = 13; 4 · 13 · [10 100] = [520 5200]
    assert out.tolist() == [[523.0, 5205.0]]


def test_a_value_by_hand():
    params = {"kernel": jnp.array([[2.0], [-1.0]]), "bias": jnp.array(0.5)}
    # 6 − 4 + .5
    assert layers.Value().apply({"params": params}, jnp.array([[3.0, 4.0]])).tolist() == [2.5]
