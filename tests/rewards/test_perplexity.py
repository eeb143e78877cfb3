from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import toys

from jaxppo.rewards import in_program


def by_hand(toy, rolled):
    """Mean of log softmax(logits of the slot before)[token] over the sampled tokens."""
    hidden, _ = toy.model.apply(toy.params, rolled.tokens, rolled.attend)
    logp = np.asarray(jax.nn.log_softmax(toy.model.logits(toy.params, hidden)))
    tokens, mask, first = (
        np.asarray(rolled.tokens),
        np.asarray(rolled.mask),
        rolled.tokens.shape[1] - rolled.mask.shape[1],
    )
    terms = [
        [logp[b, first + t - 1, tokens[b, first + t]] for t in range(mask.shape[1]) if mask[b, t]]
        for b in range(len(mask))
    ]
    return np.array([np.mean(row) for row in terms])


def test_minus_the_log_perplexity_of_another_model(llama):
    """At temperature 1, whatever the policy samples with; chunks of logits change nothing."""
    rolled = toys.roll(llama, toys.prompts())
    assert len(set(np.asarray(rolled.mask).sum(1).tolist())) > 1  # responses of several lengths
    judge = toys.gpt2()
    for settings in (
        replace(toys.SETTINGS, temperature=0.5, top_k=2),
        replace(toys.SETTINGS, logits_bytes=200),
    ):
        scores, valid = jax.jit(in_program.fluency(judge.model, settings, scale=2.0))(
            judge.params, rolled
        )
        np.testing.assert_allclose(scores, 2 * by_hand(judge, rolled), rtol=1e-5)
        assert valid.all() and (scores < 0).all()


def test_what_nonsense_costs_at_most(llama):
    rolled = toys.roll(llama, toys.prompts())
    plain = by_hand(llama, rolled)
    cap = float(np.median(-plain))
    scores, _ = in_program.fluency(llama.model, toys.SETTINGS, scale=2.0, cap=cap)(
        llama.params, rolled
    )
    np.testing.assert_allclose(scores, 2 * np.maximum(plain, -cap), rtol=1e-5)
    assert 0 < (plain < -cap).sum() < 8


def test_what_has_no_perplexity_is_invalid(llama):
    rolled = toys.roll(llama, toys.prompts())
    empty = rolled.replace(mask=rolled.mask.at[2].set(0.0))
    assert in_program.fluency(llama.model, toys.SETTINGS)(llama.params, empty)[1].tolist() == [
        i != 2 for i in range(8)
    ]
    broken = {**llama.params, "embed": jax.tree.map(lambda x: x * jnp.nan, llama.params["embed"])}
    assert not in_program.fluency(llama.model, toys.SETTINGS)(broken, rolled)[1].any()
