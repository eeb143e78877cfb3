import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo.models import cache


def test_an_empty_cache():
    new = cache.empty(2, (3, 1, 4, 5), jnp.bfloat16)
    assert [x.shape for x in (*new.keys, *new.values)] == [(3, 1, 4, 5)] * 4
    assert new.keys[0].dtype == jnp.bfloat16 and not new.attend.any() and int(new.filled) == 0


def test_write():
    """Slots 1 and 2 of four are written, in the cache's type."""
    new = jnp.arange(1.0, 5.0).reshape(1, 1, 2, 2)
    got = cache.write(jnp.zeros((1, 1, 4, 2), jnp.bfloat16), new, 1)
    assert got.dtype == jnp.bfloat16
    assert got[0, 0].tolist() == [[0.0, 0.0], [1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]


def test_take_picks_rows_and_the_prompts_they_share():
    """Two networks' caches: rows 2 and 0 go on, which read prompts 1 and 0."""
    number = lambda rows: jnp.arange(1.0 * rows).reshape(rows, 1, 1, 1)
    prompt = cache.Cache((number(2),), (number(2),), jnp.ones((2, 1), bool), jnp.int32(1))
    own = cache.Cache((number(4),), (-number(4),), jnp.ones((4, 1), bool), jnp.int32(7), prompt)
    rows, prompts = jnp.array([2, 0]), jnp.array([1, 0])
    for got in cache.take((own, own), lambda x: x[rows], lambda x: x[prompts]):
        assert got.keys[0].ravel().tolist() == [2, 0] and got.values[0].ravel().tolist() == [-2, 0]
        assert got.prompt.keys[0].ravel().tolist() == [1, 0]
        assert int(got.filled) == 7 and int(got.prompt.filled) == 1


@pytest.mark.ci
def test_a_shared_prompt_equals_a_prompt_in_each_row(family):
    """Two prompts of which each has three rows: the hidden states of three further tokens equal
    those of a cache in which each row holds its prompt.
    """
    model, params = family.model, family.params
    few = toys.ragged([2, 4], 4)
    many = toys.grouped(3, 6).replace(
        tokens=jnp.repeat(few.tokens, 3, 0), mask=jnp.repeat(few.mask, 3, 0)
    )
    _, whole = model.apply(params, many.tokens, many.mask, cache=model.init_cache(6, 7))
    _, prompt = model.apply(params, few.tokens, few.mask, cache=model.init_cache(2, 4))
    shared = model.init_cache(6, 3, prompt=prompt)
    rng = np.random.default_rng(0)
    for _ in range(3):
        tokens = jnp.asarray(rng.integers(2, toys.VOCAB, (6, 1)), jnp.int32)
        attend = jnp.asarray(rng.random((6, 1)) < 0.8)
        one, whole = model.apply(params, tokens, attend, cache=whole)
        other, shared = model.apply(params, tokens, attend, cache=shared)
        np.testing.assert_allclose(one, other, atol=1e-5)
