import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import models, ppo, supervised
from jaxppo.config import RunConfig
from jaxppo.data import rows, sentiment
from jaxppo.models import int8, layers, lora, scan, shapes
from jaxppo.run import load, validation

SHAPE = shapes.llama(
    vocab_size=64, width=64, num_layers=2, num_heads=4, num_kv_heads=2, max_length=32
)


def floats(params):
    """The parameters with kernels as the numbers that 8 bits hold."""
    return lora.fold(params, alpha=1.0)


def flat_of(tree):
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


def weights(shape, *, lora_on="all", scale=1.0):
    """(a model with adapters, its base, its adapters), all random."""
    model = toys.compiled(models.make(shape, lora=2, lora_on=lora_on))
    params = jax.tree.map(lambda x: scale * x, toys.random_params(model))
    trained, base = lora.split(params, lora.is_trained)
    return model, base, trained


@pytest.mark.ci
def test_kernels_of_linear_layers_alone():
    """Each number is off by half a step at most, and the largest of a column is 127 steps."""
    base = jax.device_get(weights(SHAPE)[1])
    got = int8.quantise(base)
    for layer in ("attention", "mlp"):
        for name, own in base["layers_0"][layer].items():
            found = got["layers_0"][layer][name]
            assert found["kernel"].dtype == np.int8 and isinstance(found["kernel"], np.ndarray)
            assert found["kernel_scale"].shape == own["kernel"].shape[1:]
            step = found["kernel_scale"][None]
            assert (abs(found["kernel"] * step - own["kernel"]) <= 0.501 * step).all()
            assert (abs(found["kernel"]).max(0) == 127).all()
    toys.assert_same(got["embed"], base["embed"])
    toys.assert_same(got["final_norm"], base["final_norm"])
    toys.assert_same(got["layers_0"]["mlp_norm"], base["layers_0"]["mlp_norm"])
    untied = models.make(dataclasses.replace(toys.LLAMA, tied=False))
    assert int8.quantise(toys.random_params(untied))["head"]["kernel"].dtype == jnp.float32


def test_a_layer_by_hand():
    """Steps of .5 and 2: x W = (3 · 2 + 5 · 4) · .5 and (3 − 5) · 2, plus the bias."""
    params = {
        "kernel": jnp.array([[2, 1], [4, -1]], jnp.int8),
        "kernel_scale": jnp.array([0.5, 2.0]),
        "bias": jnp.array([1.0, 0.0]),
    }
    x = jnp.array([[3.0, 5.0]])
    out = layers.Linear(2, True).apply({"params": params}, x)
    assert out.tolist() == [[14.0, -4.0]]
    total = lambda x: layers.Linear(2, True).apply({"params": params}, x) @ jnp.array([1.0, 10.0])
    # dy W = .5 · (2, 4) + 10 · 2 · (1, −1)
    assert jax.grad(lambda x: total(x).sum())(x).tolist() == [[21.0, -18.0]]


@pytest.mark.ci
@pytest.mark.parametrize("shape", [toys.LLAMA, toys.GPT2], ids=["llama", "gpt2"])
def test_eight_bits_equal_their_numbers_in_float32(shape):
    """Logits, gradients of the adapters, scanned layers, and a pass in two parts with a cache."""
    model, base, trained = weights(shape, scale=0.5)
    small, prompts = int8.quantise(base), toys.ragged([4, 3, 1], 4)

    def logits(trained, base, model=model):
        params = lora.merge(base, trained)
        return model.logits(params, model.apply(params, prompts.tokens, prompts.mask)[0])

    want = logits(trained, floats(small))
    np.testing.assert_allclose(logits(trained, small), want, atol=1e-5)
    scanned = toys.compiled(models.make(shape, lora=2, lora_on="all", scan=True))
    stacked = int8.quantise(scan.stack_layers(base))
    toys.assert_same(scan.unstack_layers(stacked), small)
    got = logits(scan.stack_layers(trained), stacked, scanned)
    np.testing.assert_allclose(got, want, atol=1e-5)
    slope = jax.grad(lambda trained, base: jnp.sin(logits(trained, base)).sum())
    toys.assert_close(slope(trained, small), slope(trained, floats(small)), atol=1e-4, rtol=1e-4)
    twice = jax.grad(lambda x: jnp.vdot(*map(flat_of, (slope(x, small), x))))
    want_twice = jax.grad(lambda x: jnp.vdot(*map(flat_of, (slope(x, floats(small)), x))))
    toys.assert_close(twice(trained), want_twice(trained), atol=1e-3, rtol=1e-3)
    got = toys.logits_in_two_parts(model, lora.merge(small, trained), prompts)
    np.testing.assert_allclose(got[prompts.mask], want[prompts.mask], atol=1e-5)


@pytest.mark.ci
def test_the_error_of_logits():
    """Against float32, of a new network: a hundredth of the logits' deviation at most, but not
    none.
    """
    model = toys.compiled(models.make(SHAPE))
    params = jax.jit(model.init)(jax.random.key(0))
    prompts = toys.prompts()

    def logits(params):
        hidden, _ = model.apply(params, prompts.tokens, prompts.mask)
        return np.asarray(model.logits(params, hidden))[prompts.mask]

    want = logits(params)
    error = (logits(int8.quantise(params)) - want).std() / want.std()
    assert 1e-4 < error < 1e-2


def test_the_weights_that_a_step_samples_with():
    """Adapters are in the kernels: 1 · .5 + 2 · (1 · .25) = 1 is the largest of the first column.
    The critic is left out, and what masks tokens stays.
    """
    q = {
        "kernel": jnp.array([[0.5, 3.0], [0.5, -6.0]]),
        "lora_a": jnp.array([[1.0], [0.0]]),
        "lora_b": jnp.array([[0.25, 0.0]]),
    }
    params = {"layers_0": {"q": q}, "critic": {"q": q}, "lagged": {"q": q}}
    got = int8.sampling_weights(params, alpha=2.0)
    assert got.keys() == {"layers_0", "lagged"} and got["lagged"] == {"q": q}
    own = got["layers_0"]["q"]
    assert own.keys() == {"kernel", "kernel_scale"}
    assert own["kernel"].tolist() == [[127, 64], [64, -127]]  # 63.5 is rounded to even
    np.testing.assert_allclose(127 * own["kernel_scale"], [1.0, 6.0], rtol=1e-6)


@pytest.mark.ci
def test_steps_are_computed_in_float32():
    """A bfloat16 scale of 1.01 / 127 would be off by a quarter of a percent."""
    kernel = jnp.array([[1.0078125], [0.5]], jnp.bfloat16)
    own = int8.quantise({"q": {"kernel": kernel}})["q"]
    assert own["kernel_scale"].dtype == jnp.float32
    np.testing.assert_allclose(127 * own["kernel_scale"], [1.0078125], rtol=1e-6)
    twice = int8.sampling_weights({"q": own}, alpha=1.0)["q"]  # of a base in 8 bits
    assert twice["kernel"].tolist() == own["kernel"].tolist() == [[127], [63]]


@pytest.mark.slow
def test_smollm2_in_8_bits_predicts_almost_as_well():
    """The perplexity of 64 movie reviews rises by less than 2 %."""
    perplexities = []
    for name in ("same", "int8"):
        config = RunConfig(model="smollm2", base_dtype=name, batch_size=16)
        config, policy = load.load_policy(config)
        texts = sentiment.load_reviews().texts[:64]
        held_out = rows.from_ids([policy.tokenizer.encode(x) for x in texts], 48)
        objective = supervised.language_model(policy.model, config)
        evaluate = validation.make_validation(config, policy, objective, held_out)
        state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
        perplexities.append(evaluate(state)["perplexity"])
    assert 0 < perplexities[1] / perplexities[0] - 1 < 0.02
