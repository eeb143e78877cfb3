import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import policy
from jaxppo.rewards import in_program, text
from jaxppo.rewards.in_program import count_token
from jaxppo.rewards.metrics import Text
from jaxppo.types import Rollout


@pytest.fixture(scope="module")
def rolled(llama):
    return toys.roll(llama, toys.prompts())


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


def test_the_token_may_be_traced(rolled):
    counts = jax.vmap(lambda token: count_token(token)({}, rolled)[0])(jnp.arange(toys.VOCAB))
    assert (counts.sum(0) == rolled.mask.sum(1)).all()  # every sampled token is one of them


def test_last_value(llama):
    """Rows of 4 and 2 tokens, padded on the left and on the right."""
    prompts = toys.ragged([4, 2], 4)
    tokens = jnp.concatenate([prompts.tokens, jnp.zeros((2, 1), jnp.int32)], 1)
    # nothing is read after the end
    mask = jnp.concatenate([prompts.mask, jnp.zeros((2, 1), bool)], 1)
    hidden, _ = llama.model.apply(llama.params, prompts.tokens, prompts.mask)
    want = llama.model.value(llama.params, hidden)[:, 3]
    np.testing.assert_allclose(
        policy.last_value(llama.model, llama.params, tokens, mask), want, rtol=1e-5
    )
    assert len(set(np.asarray(want).tolist())) == 2


def test_reward_model(llama, rolled):
    scores, valid = in_program.reward_model(llama.model, scale=2.0)(llama.params, rolled)
    np.testing.assert_allclose(
        scores,
        2 * policy.last_value(llama.model, llama.params, rolled.tokens, rolled.attend),
        rtol=1e-6,
    )
    assert valid.all()
    broken = {**llama.params, "value": {**llama.params["value"], "bias": jnp.array(jnp.nan)}}
    assert not in_program.reward_model(llama.model)(broken, rolled)[1].any()


def mean_logprobs(toy, rolled):
    """Mean of log softmax(logits of the slot before)[token] over the sampled tokens."""
    hidden, _ = toy.model.apply(toy.params, rolled.tokens, rolled.attend)
    logp = np.asarray(jax.nn.log_softmax(toy.model.logits(toy.params, hidden)))
    tokens, mask = np.asarray(rolled.tokens), np.asarray(rolled.mask)
    first = tokens.shape[1] - mask.shape[1]
    terms = [
        [logp[b, first + t - 1, tokens[b, first + t]] for t in range(mask.shape[1]) if mask[b, t]]
        for b in range(len(mask))
    ]
    return np.array([np.mean(row) for row in terms])


def test_fluency_is_minus_the_log_perplexity(rolled):
    """At temperature 1, whatever the policy samples with; chunks of logits change nothing."""
    assert len(set(np.asarray(rolled.mask).sum(1).tolist())) > 1  # responses of several lengths
    judge = toys.gpt2()
    for settings in (
        dataclasses.replace(toys.SETTINGS, temperature=0.5, top_k=2),
        dataclasses.replace(toys.SETTINGS, logits_bytes=200),
    ):
        scores, valid = jax.jit(in_program.fluency(judge.model, settings, scale=2.0))(
            judge.params, rolled
        )
        np.testing.assert_allclose(scores, 2 * mean_logprobs(judge, rolled), rtol=1e-5)
        assert valid.all() and (scores < 0).all()


def test_fluency_is_capped(llama, rolled):
    plain = mean_logprobs(llama, rolled)
    cap = float(np.median(-plain))
    scores, _ = in_program.fluency(llama.model, toys.SETTINGS, scale=2.0, cap=cap)(
        llama.params, rolled
    )
    np.testing.assert_allclose(scores, 2 * np.maximum(plain, -cap), rtol=1e-5)
    assert 0 < (plain < -cap).sum() < 8


def test_rows_without_a_perplexity_are_invalid(llama, rolled):
    empty = rolled.replace(mask=rolled.mask.at[2].set(0.0))
    assert in_program.fluency(llama.model, toys.SETTINGS)(llama.params, empty)[1].tolist() == [
        i != 2 for i in range(8)
    ]
    broken = {**llama.params, "embed": jax.tree.map(lambda x: x * jnp.nan, llama.params["embed"])}
    assert not in_program.fluency(llama.model, toys.SETTINGS)(broken, rolled)[1].any()


def rows(*ids, width=6) -> Text:
    """Slots after a text's end repeat its first token, and must not count."""
    tokens = np.array(
        [[*row, *[row[0] if row else 0] * (width - len(row))] for row in ids], np.int32
    )
    return Text(jnp.asarray(tokens), jnp.asarray([len(row) for row in ids], jnp.int32))


def test_repeats():
    """1 2 1 2 1 has the bigrams 12 21 12 21: two of four repeat. 1 1 1: 11 11, one of two."""
    some = rows([1, 2, 1, 2, 1], [1, 1, 1], [1, 2, 3], [1], [])
    assert in_program.count_repeats(some, 2).tolist() == [2, 1, 0, 0, 0]
    assert in_program.repeated_share(some, 2).tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(
        in_program.repeated_share(some, 1), [3 / 5, 2 / 3, 0, 0, 0], rtol=1e-6
    )
    assert in_program.repeated_share(some, 7).tolist() == [0.0] * 5  # longer than any text


@pytest.mark.parametrize("n", [1, 2, 3])
def test_repeats_as_on_the_host(n):
    rng = np.random.default_rng(n)
    ids = [rng.integers(0, 4, rng.integers(0, 13)).tolist() for _ in range(1000)]
    some = rows(*ids, width=12)
    spell = lambda row: " ".join(map(str, row))
    np.testing.assert_allclose(
        in_program.repeated_share(some, n),
        [text.repeated_share(spell(row), n) for row in ids],
        atol=1e-6,
    )


def test_repetition_ignores_the_end_of_text(rolled):
    """3 3 3 and the end of text have one repeated bigram of two, not of three."""
    tokens = jnp.zeros((8, 5), jnp.int32).at[:, :4].set(jnp.array([3, 3, 3, toys.EOS]))
    rolled = rolled.replace(
        tokens=jnp.concatenate([rolled.tokens[:, :4], tokens], 1),
        mask=jnp.ones((8, 5)).at[:, 4].set(0.0),
    )
    scores, valid = jax.jit(in_program.repetition(eos=toys.EOS, scale=3.0))({}, rolled)
    assert scores.tolist() == [-1.5] * 8 and valid.all()
