import jax
import jax.numpy as jnp
import toys

from jaxppo.rewards.in_program import count_token
from jaxppo.types import Rollout


def test_count_token():
    """The prompt's own tokens and those after the end do not count."""
    tokens = jnp.array([[3, 3, 3, 5, 3], [3, 5, 5, 5, 5], [0, 3, 3, 1, 3]])
    mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    zeros = jnp.zeros((3, 3))
    scores, valid = count_token(3)(
        {}, Rollout(tokens, tokens > 0, mask, mask[:, 0] > 0, zeros, zeros, zeros, zeros)
    )
    assert scores.tolist() == [2.0, 0.0, 1.0]
    assert scores.dtype == jnp.float32 and valid.dtype == bool
    assert valid.all()


def test_the_token_may_be_traced(llama):
    rolled = toys.roll(llama, toys.prompts())
    counts = jax.vmap(lambda token: count_token(token)({}, rolled)[0])(jnp.arange(toys.VOCAB))
    assert (counts.sum(0) == rolled.mask.sum(1)).all()  # every sampled token is one of them
