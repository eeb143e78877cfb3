import jax
import jax.numpy as jnp
import pytest
import toys

from jaxppo import types
from jaxppo.types import Rollout


def test_check_accepts_what_the_design_says():
    types.check_prompts(toys.prompts(), prompt_length=4)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tokens", jnp.zeros((8, 4), jnp.float32), ["prompts.tokens", "float32"]),
        ("mask", jnp.zeros((8, 4), jnp.float32), ["prompts.mask", "float32"]),
        ("mask", jnp.zeros((8, 3), bool), ["prompts.mask", "[8, 4]", "[8, 3]"]),
        ("index", jnp.zeros((7,), jnp.int32), ["prompts.index", "[8]", "[7]"]),
    ],
)
def test_check_names_the_field_and_both_shapes(name, value, words):
    with pytest.raises(ValueError) as caught:
        types.check_prompts(toys.prompts().replace(**{name: value}), prompt_length=4)
    for word in words:
        assert word in str(caught.value)


def test_check_of_another_prompt_length():
    with pytest.raises(ValueError, match=r"\[8, 6\].*\[8, 4\]"):
        types.check_prompts(toys.prompts(), prompt_length=6)


def test_check_works_while_tracing():
    def program(prompts):
        types.check_prompts(prompts, prompt_length=4)
        return prompts.tokens

    jax.eval_shape(program, toys.prompts())
    jax.vmap(program)(jax.tree.map(lambda x: jnp.stack([x, x]), toys.prompts()))


def test_response_is_the_end_of_the_row():
    zeros = jnp.zeros((1, 2))
    tokens = jnp.array([[5, 6, 7, 8, 9]])
    rollout = Rollout(tokens, tokens > 0, zeros, jnp.array([False]), zeros, zeros, zeros, zeros)
    assert rollout.response.tolist() == [[8, 9]]  # the mask says: 2 of 5


def test_structs_are_trees():
    prompts = toys.prompts().replace(extra={"label": jnp.arange(8)})
    toys.assert_same(jax.jit(lambda x: x)(prompts), prompts)
    assert len(jax.tree.leaves(prompts)) == 4
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), prompts)
    assert jax.vmap(lambda p: p.extra["label"])(stacked).shape == (2, 8)
