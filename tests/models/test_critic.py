import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import models
from jaxppo.errors import UserError
from jaxppo.models import critic, shapes
from jaxppo.models.critic import init_value


@pytest.fixture(scope="module")
def pair() -> toys.Toy:
    """Actor and critic: two small Llamas with different parameters."""
    one = toys.llama()
    model = critic.with_critic(one.model, one.model, width=one.config.width)
    return toys.Toy(one.config, model, toys.random_params(model, seed=2))


@pytest.mark.ci
def test_logits_are_the_actors_and_values_the_critics(pair, llama):
    prompts = toys.prompts()
    hidden, _ = jax.jit(pair.model.apply)(pair.params, prompts.tokens, prompts.mask)
    own, _ = jax.jit(llama.model.apply)(pair.params, prompts.tokens, prompts.mask)
    seen, _ = jax.jit(llama.model.apply)(pair.params["critic"], prompts.tokens, prompts.mask)
    np.testing.assert_allclose(
        pair.model.logits(pair.params, hidden),
        llama.model.logits(pair.params, own),
        rtol=1e-5,
        atol=1e-5,
    )
    want = llama.model.value(pair.params["critic"], seen)
    np.testing.assert_allclose(pair.model.value(pair.params, hidden), want, rtol=1e-5, atol=1e-5)
    assert "value" not in pair.params


@pytest.mark.ci
def test_gradients_of_policy_and_critic_are_separate(pair):
    rolled = toys.roll(pair, toys.prompts())
    pull = lambda name: jax.grad(
        lambda params: getattr(toys.score(pair, rolled, params=params), name).sum()
    )(pair.params)
    moved = lambda grads: {
        k for k, x in grads.items() if any(np.asarray(g).any() for g in jax.tree.leaves(x))
    }
    assert moved(pull("values")) == {"critic"}
    assert moved(pull("logprobs")) == set(pair.params) - {"critic"}


def test_cached_decoding_equals_the_full_pass(pair):
    rolled = toys.roll(pair, toys.prompts())
    scores = toys.score(pair, rolled)
    np.testing.assert_allclose(rolled.values, scores.values * rolled.mask, atol=1e-4)
    np.testing.assert_allclose(rolled.logprobs, scores.logprobs * rolled.mask, atol=1e-4)
    # a reference has no critic
    np.testing.assert_allclose(rolled.ref_logprobs, rolled.raw_logprobs, atol=1e-4)


@pytest.mark.parametrize("separate", [False, True])
def test_a_random_value_head(pair, llama, separate):
    """Width 16: standard deviation 1 / √17."""
    params = pair.params if separate else llama.params
    wide = {"value": {"kernel": jnp.zeros((4000, 1)), "bias": jnp.zeros(())}}
    got = critic.init_value(wide, jax.random.key(0), "normal")["value"]["kernel"]
    assert float(got.std()) == pytest.approx(4001**-0.5, rel=0.05)
    new = critic.init_value(params, jax.random.key(0), "normal")
    owner, old = (x["critic"] if separate else x for x in (new, params))
    assert (owner["value"]["kernel"] != old["value"]["kernel"]).all()
    toys.assert_same(owner["embed"], old["embed"])
    # it is zero from its module
    toys.assert_same(critic.init_value(params, jax.random.key(0), "zero"), params)


def test_a_critic_may_start_from_the_reward_model(pair, llama):
    reward = toys.random_params(llama.model, seed=9)
    critic = init_value(pair.params, jax.random.key(0), "reward", reward)["critic"]
    toys.assert_same(critic, reward)
    assert critic["embed"]["embedding"] is not reward["embed"]["embedding"]  # donated to each step
    shared = init_value(llama.params, jax.random.key(0), "reward", reward)
    toys.assert_same(shared["value"], reward["value"])
    toys.assert_same(shared["embed"], llama.params["embed"])


def test_a_reward_model_of_another_shape_is_refused(pair):
    for other in (
        None,
        {"net": 1},
        jax.eval_shape(models.make(shapes.llama(vocab_size=5)).init, jax.random.key(0)),
    ):
        with pytest.raises(UserError, match="--value-init reward"):
            critic.init_value(pair.params, jax.random.key(0), "reward", other)


@pytest.mark.ci
def test_actor_and_critic_do_not_begin_with_the_same_weights(llama):
    model = critic.with_critic(llama.model, llama.model, width=llama.config.width)
    params = model.init(jax.random.key(0))
    own, other = (x["embed"]["embedding"] for x in (params, params["critic"]))
    assert (own != other).any()
