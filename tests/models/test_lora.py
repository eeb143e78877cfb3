import jax
import jax.numpy as jnp
import numpy as np
import toys

from jaxppo import models
from jaxppo.models import lora, scan

TREE = {
    "q": {"kernel": 1, "lora_a": 2, "lora_b": 3},
    "mlp": {"up": {"kernel": 4}},
    "value": {"kernel": 5, "bias": 6},
}


def test_split_and_merge_are_inverse():
    trained, base = lora.split(TREE, lora.is_trained)
    assert trained == {"q": {"lora_a": 2, "lora_b": 3}, "value": {"kernel": 5, "bias": 6}}
    assert base == {"q": {"kernel": 1}, "mlp": {"up": {"kernel": 4}}}  # nothing empty is left
    assert lora.merge(base, trained) == TREE


def test_merge_copies_nothing():
    base, trained = {"a": {"x": jnp.zeros(2), "y": jnp.ones(2)}}, {"a": {"x": jnp.full(2, 7.0)}}
    out = lora.merge(base, trained)
    assert out["a"]["x"] is trained["a"]["x"] and out["a"]["y"] is base["a"]["y"]
    assert not base["a"]["x"].any()  # neither argument is changed
    assert lora.merge({}, trained) == trained


def test_is_trained():
    assert lora.is_trained(("layers_0", "attention", "q", "lora_a"))
    assert lora.is_trained(("value", "kernel"))
    assert not lora.is_trained(("layers_0", "attention", "q", "kernel"))


def test_count():
    assert lora.count({"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4)}}) == 10


def test_size_of_adapters():
    toy = toys.make(toys.LLAMA, lora=2)
    trained, base = lora.split(toy.params, lora.is_trained)
    # q: 16 x 2 + 2 x 16; v (2 heads of 4): 16 x 2 + 2 x 8; value head: 16 + 1
    assert lora.count(trained) == 64 + 48 + 17
    assert lora.count(trained) + lora.count(base) == lora.count(toy.params)


def test_gradients_reach_only_the_trained_part():
    toy = toys.make(toys.LLAMA, lora=2)
    trained, base = lora.split(toy.params, lora.is_trained)
    prompts = toys.prompts()

    def total(trained, base):
        params = lora.merge(base, trained)
        hidden, _ = toy.model.apply(params, prompts.tokens, prompts.mask)
        return (
            jnp.sin(toy.model.logits(params, hidden)).sum() + toy.model.value(params, hidden).sum()
        )

    gradient = jax.jit(jax.grad(total))(trained, base)
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(gradient))


def test_folded_adapters_are_the_same_network():
    model, plain = models.make(toys.LLAMA, lora=2), models.make(toys.LLAMA)
    params = toys.random_params(model)
    prompts = toys.prompts()
    want, _ = model.apply(params, prompts.tokens, prompts.mask)
    folded = lora.fold(params, alpha=16.0)
    assert jax.tree.structure(folded) == jax.tree.structure(
        jax.eval_shape(plain.init, jax.random.key(0))
    )
    got, _ = plain.apply(folded, prompts.tokens, prompts.mask)
    np.testing.assert_allclose(got, want, atol=1e-4)
    stacked = scan.unstack_layers(lora.fold(scan.stack_layers(params), alpha=16.0))
    toys.assert_close(stacked, folded, atol=1e-6)


def test_adapters_are_added_before_rounding():
    """1 in bfloat16, whose next number is 1 + 2⁻⁷, and an adapter of 2⁻⁹."""
    one = jnp.ones((1, 1))
    params = {"kernel": one.astype(jnp.bfloat16), "lora_a": one, "lora_b": one * 2**-9}
    assert lora.fold(params, alpha=1.0)["kernel"].tolist() == [[1 + 2**-9]]
