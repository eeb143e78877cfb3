import jax.numpy as jnp
import numpy as np
import toys

from jaxppo import policy
from jaxppo.rewards import in_program


def test_the_value_at_the_last_token(llama):
    """Rows of 4 and 2 tokens, padded on the left; and one that ended before its row."""
    prompts = toys.ragged([4, 2], 4)
    tokens = jnp.concatenate([prompts.tokens, jnp.zeros((2, 1), jnp.int32)], 1)
    mask = jnp.concatenate(
        [prompts.mask, jnp.zeros((2, 1), bool)], 1
    )  # nothing is read behind the end
    hidden, _ = llama.model.apply(llama.params, prompts.tokens, prompts.mask)
    want = llama.model.value(llama.params, hidden)[:, 3]
    np.testing.assert_allclose(
        policy.last_value(llama.model, llama.params, tokens, mask), want, rtol=1e-5
    )
    assert len(set(np.asarray(want).tolist())) == 2


def test_as_a_reward(llama):
    rolled = toys.roll(llama, toys.prompts())
    scores, valid = in_program.learned(llama.model, scale=2.0)(llama.params, rolled)
    np.testing.assert_allclose(
        scores,
        2 * policy.last_value(llama.model, llama.params, rolled.tokens, rolled.attend),
        rtol=1e-6,
    )
    assert valid.all()
    broken = {**llama.params, "value": {**llama.params["value"], "bias": jnp.array(jnp.nan)}}
    assert not in_program.learned(llama.model)(broken, rolled)[1].any()
