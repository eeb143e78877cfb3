from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import policy
from jaxppo.models import missing
from jaxppo.types import Model

HOLES = np.array([4, 9, 10])  # the last two are padding of the embedding
LONG = replace(toys.SETTINGS, response_length=12)


@pytest.fixture(scope="module")
def llama():
    return toys.make(replace(toys.LLAMA, tied=False))


@pytest.fixture(scope="module")
def holed(llama):
    """A toy model that likes the ids without a token best."""

    def likes(params, hidden):
        own = llama.model.logits(params, hidden)
        return own + 9.0 * jnp.broadcast_to(np.isin(np.arange(toys.VOCAB), HOLES), own.shape)

    return llama._replace(model=missing.without(llama.model._replace(logits=likes), HOLES))


def test_without_such_ids_the_model_is_itself(llama):
    assert missing.without(llama.model, np.array([], int)) is llama.model


@pytest.mark.ci
@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"top_k": 11}, {"temperature": 0.5}])
def test_they_are_never_sampled(holed, options):
    settings = replace(LONG, **{k: x for k, x in options.items() if k != "greedy"})
    rolled = toys.roll(holed, toys.prompts(), settings, greedy="greedy" in options)
    assert not np.isin(rolled.response, HOLES).any()
    assert np.isfinite(rolled.raw_logprobs).all() and np.isfinite(rolled.ref_logprobs).all()


@pytest.mark.ci
def test_log_probs_entropy_and_divergence_are_those_of_the_other_ids(llama, holed):
    """As those of a model that has no rows for them."""
    hidden = jax.random.normal(jax.random.key(1), (3, 16))
    others = np.setdiff1d(np.arange(toys.VOCAB), HOLES)
    cut = llama.model._replace(logits=lambda p, h: llama.model.logits(p, h)[..., others])
    tokens = jnp.array([0, 5, 8])
    logits = holed.model.logits(llama.params, hidden)
    assert np.isfinite(logits).all()  # any divergence of a user's may multiply them by 0
    own = policy.choices(logits, tokens, config=LONG)
    want = policy.choices(
        cut.logits(llama.params, hidden), jnp.searchsorted(others, tokens), config=LONG
    )
    for one, other in zip(own, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    rolled = toys.roll(holed, toys.prompts(), LONG)
    moved = toys.random_params(llama.model, seed=3)

    def divergence(model: Model, rolled):
        return policy.full_kl(model, moved, llama.params, rolled, config=LONG)

    np.testing.assert_allclose(divergence(holed.model, rolled), divergence(cut, rolled), atol=1e-4)


def test_they_have_no_gradient_and_spoil_none(holed):
    rolled = toys.roll(holed, toys.prompts(), LONG)

    def loss(params):
        scored = policy.response_logprobs(holed.model, params, rolled, config=LONG)
        kl = policy.full_kl(holed.model, params, holed.params, rolled, config=LONG)
        return (scored.logprobs + scored.entropy).sum() + kl.sum()

    grads = jax.jit(jax.grad(loss))(holed.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    head = np.asarray(grads["head"]["kernel"])
    assert not head[:, HOLES].any() and head.any()
