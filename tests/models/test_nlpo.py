from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import sampling
from jaxppo.config import Config
from jaxppo.models import nlpo


def test_only_the_nucleus_of_the_lagged_policy_is_allowed(strict):
    """Its likeliest tokens are 3 and 2 (.5, .3). The policy's top-k 1 keeps token 2 of them."""
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.3, 0.1]]))
    lagged = jnp.log(jnp.array([[0.1, 0.1, 0.3, 0.5]]))

    def kept(**options):
        config = Config(**options)
        allowed = nlpo.nucleus(lagged, config=config)
        return np.isfinite(sampling.process(logits, sample=config, allowed=allowed)[0]).tolist()

    assert kept(mask_top_p=0.7) == [False, False, True, True]
    assert kept(mask_top_p=0.7, top_k=1) == [False, False, True, False]
    assert kept(mask_top_p=0.4) == [False, False, False, True]


def test_without_a_mask_the_model_is_itself(llama):
    config = Config(mask_top_p=0.5)
    assert nlpo.with_mask(llama.model, replace(config, mask_top_p=1.0)) is llama.model
    model = nlpo.with_mask(llama.model, config)
    tokens = jnp.array([[3, 1, 4, 1]])
    attend = jnp.ones(tokens.shape, bool)
    alone, _ = llama.model.apply(llama.params, tokens, attend)
    hidden, _ = model.apply(llama.params, tokens, attend)  # a reference policy has no mask
    np.testing.assert_array_equal(hidden, alone)
    assert model.allowed(llama.params, hidden) is None


@pytest.mark.ci
def test_masked_model_equals_both_models_alone(llama):
    config = Config(mask_top_p=0.5)
    lagged = toys.random_params(llama.model, seed=6)
    model = nlpo.with_mask(llama.model, config)
    params = nlpo.with_lagged(llama.params, {"lagged": lagged})
    tokens = jnp.array([[3, 1, 4, 1]])
    attend = jnp.ones(tokens.shape, bool)
    hidden, _ = model.apply(params, tokens, attend)
    own, _ = llama.model.apply(llama.params, tokens, attend)
    other, _ = llama.model.apply(lagged, tokens, attend)
    np.testing.assert_array_equal(
        model.logits(params, hidden), llama.model.logits(llama.params, own)
    )
    np.testing.assert_array_equal(model.value(params, hidden), llama.model.value(llama.params, own))
    np.testing.assert_array_equal(
        model.allowed(params, hidden[0]),
        nlpo.nucleus(llama.model.logits(lagged, other[0]), config=config),
    )
