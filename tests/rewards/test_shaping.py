import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo import kl
from jaxppo.rewards import penalise_missing_eos, token_rewards
from jaxppo.types import Rollout

MASK = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])


def rollout(logprobs, ref_logprobs, tokens=None) -> Rollout:
    tokens = jnp.full((3, 4), 1) if tokens is None else tokens
    return Rollout(
        tokens, tokens > -1, MASK, jnp.array([True, False, False]), jnp.zeros((3, 3)), logprobs, ref_logprobs, jnp.zeros((3, 3))
    )  # fmt: skip


ROLLOUT = rollout(
    jnp.array([[-1.0, -2.0, 9.0], [-1.0, -1.0, -1.0], [5.0, 5.0, 5.0]]),
    jnp.array([[-2.0, -1.0, 0.0], [-1.0, -3.0, -1.0], [0.0, 0.0, 0.0]]),
)


def test_the_score_is_on_the_last_acting_token(strict):
    """Not on the pad after it, and nowhere in a row without tokens."""
    out = token_rewards(jnp.array([7.0, 8.0, 9.0]), ROLLOUT, kl_coef=0.0, kl=kl.k1)
    assert out.tolist() == [[0.0, 7.0, 0.0], [0.0, 0.0, 8.0], [0.0, 0.0, 0.0]]


def test_the_penalty_is_on_every_acting_token(strict):
    out = token_rewards(jnp.array([7.0, 8.0, 9.0]), ROLLOUT, kl_coef=jnp.float32(0.5), kl=kl.k1)
    # k1: −1 + 2 = 1, −2 + 1 = −1; 0, −1 + 3 = 2, 0; halves of them, negative
    assert out.tolist() == [[-0.5, 7.5, 0.0], [0.0, -1.0, 8.0], [0.0, 0.0, 0.0]]


def test_the_estimator_is_an_argument():
    out = token_rewards(jnp.zeros(3), ROLLOUT, kl_coef=1.0, kl=kl.k2)
    np.testing.assert_allclose(out, [[-0.5, -0.5, 0.0], [0.0, -2.0, 0.0], [0.0, 0.0, 0.0]])


def test_the_temperature_only_log_probs_are_compared():
    """`logprobs` (of all processors) may be anything."""
    other = ROLLOUT.replace(logprobs=jnp.full((3, 3), jnp.nan))
    np.testing.assert_array_equal(
        token_rewards(jnp.ones(3), other, kl_coef=0.5, kl=kl.k1), token_rewards(jnp.ones(3), ROLLOUT, kl_coef=0.5, kl=kl.k1)
    )


def test_infinite_padding_changes_nothing():
    off = MASK == 0
    other = rollout(jnp.where(off, jnp.nan, ROLLOUT.raw_logprobs), jnp.where(off, -jnp.inf, ROLLOUT.ref_logprobs))
    np.testing.assert_array_equal(
        token_rewards(jnp.ones(3), other, kl_coef=0.5, kl=kl.k3), token_rewards(jnp.ones(3), ROLLOUT, kl_coef=0.5, kl=kl.k3)
    )


def test_rewards_are_float32_from_birth():
    """Scores scattered among token ids would become integers."""
    out = token_rewards(jnp.array([0.25, 0.5, 0.75]), ROLLOUT, kl_coef=0.0, kl=kl.k1)
    assert out.dtype == jnp.float32
    assert float(out.sum()) == 0.75


@pytest.mark.parametrize("token", [0, 1])
def test_a_missing_end_is_known_from_finished(token, strict):
    """Row 0 finished; rows 1 and 2 did not, whatever their tokens are."""
    same = rollout(ROLLOUT.raw_logprobs, ROLLOUT.ref_logprobs, jnp.full((3, 4), token))
    assert penalise_missing_eos(jnp.array([1.0, 1.0, 1.0]), same, penalty=0.75).tolist() == [1.0, 0.25, 0.25]
