import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax.traverse_util import flatten_dict

from jaxppo import models
from jaxppo.config import Config
from jaxppo.errors import UserError
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


ALL = {"attention/q", "attention/k", "attention/v", "attention/o"}
ALL |= {"mlp/gate", "mlp/up", "mlp/down"}


@pytest.mark.parametrize(
    ("on", "places"),
    [
        ("all", ALL),
        ("mlp,attention", ALL),
        ("attention", {x for x in ALL if x.startswith("attention")}),
        ("mlp", {x for x in ALL if x.startswith("mlp")}),
        ("v,q", {"attention/q", "attention/v"}),
        ("down", {"mlp/down"}),
    ],
)
def test_only_the_layers_that_are_named_have_adapters(on, places):
    for shape, lacks in ((toys.LLAMA, set()), (toys.GPT2, {"mlp/gate"})):
        made = jax.eval_shape(models.make(shape, lora=2, lora_on=on).init, jax.random.key(0))
        flat = flatten_dict(made, sep="/")
        found = {x.removesuffix("/lora_a") for x in flat if x.endswith("/lora_a")}
        assert found == {f"layers_0/{x}" for x in places - lacks}
        assert all(flat[f"{x}/lora_b"].shape == (2, flat[f"{x}/kernel"].shape[1]) for x in found)


def test_size_of_adapters_on_every_layer():
    """Rank 2: q and o 2 · (16 + 16) each; k and v (2 heads of 4) 2 · (16 + 8); gate, up and
    down 2 · (16 + 48).
    """
    made = jax.eval_shape(models.make(toys.LLAMA, lora=2, lora_on="all").init, jax.random.key(0))
    assert lora.count_adapters(made) == 2 * 64 + 2 * 48 + 3 * 128


@pytest.mark.parametrize("on", ["everything", "q;v", "", "q,", "head", "experts"])
def test_layers_that_a_network_lacks_are_refused_by_name(on):
    with pytest.raises(UserError, match="choose all, attention, mlp, or some of q, k") as caught:
        models.make(toys.LLAMA, lora=2, lora_on=on)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no linear layers 'gate'"):
        models.make(toys.GPT2, lora=2, lora_on="q,gate")


def test_rank_stabilised_scale():
    """16 / √4 = 8 = 32 / 4; without, 16 / 4."""
    config = Config(lora=4, lora_alpha=16.0, rslora=True)
    assert lora.alpha_of(config) == 32.0
    assert lora.alpha_of(Config(lora=4, lora_alpha=16.0)) == 16.0
    model, _ = models.make_model(config, toys.LLAMA)
    plain, _ = models.make_model(Config(lora=0), toys.LLAMA)
    model, plain = map(toys.compiled, (model, plain))
    params, prompts = toys.random_params(model), toys.prompts()
    by_hand = {**params, "layers_0": jax.tree.map(lambda x: x, params["layers_0"])}
    for name in "qv":
        own = by_hand["layers_0"]["attention"][name]
        own["kernel"] += 8.0 * own.pop("lora_a") @ own.pop("lora_b")
    want, _ = plain.apply(by_hand, prompts.tokens, prompts.mask)
    got, _ = model.apply(params, prompts.tokens, prompts.mask)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.ci
@pytest.mark.parametrize("shape", [toys.LLAMA, toys.GPT2], ids=["llama", "gpt2"])
def test_adapters_on_every_layer_merged_and_with_a_cache(shape):
    """The logits of the whole pass, of the merged weights, and of a pass in two parts with a
    cache; scanned layers, too.
    """
    adapted = models.make(shape, lora=2, lora_on="all")
    model, plain = toys.compiled(adapted), toys.compiled(models.make(shape))
    params, prompts = toys.random_params(model), toys.ragged([4, 3, 1], 4)
    params = jax.tree.map(lambda x: 0.3 * x, params)  # logits of the size of 1
    hidden, _ = model.apply(params, prompts.tokens, prompts.mask)
    want = model.logits(params, hidden)
    folded = lora.fold(params, alpha=16.0)
    found = [folded, scan.unstack_layers(lora.fold(scan.stack_layers(params), alpha=16.0))]
    for merged in found:
        got, _ = plain.apply(merged, prompts.tokens, prompts.mask)
        np.testing.assert_allclose(plain.logits(merged, got), want, atol=1e-5)
    got = toys.logits_in_two_parts(model, params, prompts)
    np.testing.assert_allclose(got[prompts.mask], want[prompts.mask], atol=1e-5)
    base = lora.split(params, lora.is_trained)[1]
    without, _ = plain.apply(base, prompts.tokens, prompts.mask)
    assert np.abs(plain.logits(base, without) - want)[prompts.mask].max() > 1e-3


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
    model, plain = map(toys.compiled, (models.make(toys.LLAMA, lora=2), models.make(toys.LLAMA)))
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
