from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import toys

from jaxppo.step_metrics import explained_variance, first_samples


def test_explained_variance_by_hand():
    mask = jnp.array([[1.0, 1.0, 1.0, 0.0]])
    returns, values = jnp.array([[1.0, 2.0, 3.0, 99.0]]), jnp.array([[1.5, 2.0, 2.5, -99.0]])
    # Var(returns) = 2/3; returns − values = −.5, 0, .5 with variance 1/6: 1 − 1/4
    assert float(explained_variance(returns, values, mask)) == pytest.approx(0.75)
    assert float(explained_variance(returns, returns, mask)) == 1
    assert float(explained_variance(jnp.ones((1, 4)), values, mask)) == 0  # nothing to explain


def test_first_samples_are_responses_to_different_prompts():
    """Groups of two; a row is tokens, -1 where nothing is attended to, and the raw scores. The 7 is
    an environment's answer: -9.
    """
    config = replace(toys.SETTINGS, group_size=2, log_samples=2)
    rolled = SimpleNamespace(
        tokens=jnp.arange(12).reshape(4, 3),
        attend=jnp.array([[0, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]], bool),
        mask=jnp.array([[1, 1], [1, 1], [0, 0], [1, 1]]),
    )
    found = first_samples(jnp.array([0.5, 1.5, 2.5, 3.5]), rolled, config)
    assert found.tolist() == [[-1, 1, 2, 0.5], [6, -9, -1, 2.5]]
    few = first_samples(jnp.zeros((4, 2)), rolled, replace(config, log_samples=9))
    assert few.shape == (2, 3 + 2)  # there are two prompts
