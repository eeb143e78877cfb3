from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from toys import SETTINGS

from jaxppo import policy

LOGITS = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))


@pytest.fixture(scope="module")
def rolled(family):
    return toys.roll(family, toys.prompts())


def test_score_is_the_shifted_log_softmax(family, rolled, strict):
    """Token t of the response is chosen by the logits of the slot before it."""
    hidden, _ = family.model.apply(family.params, rolled.tokens, rolled.attend)
    logprobs = jax.nn.log_softmax(family.model.logits(family.params, hidden))
    values = family.model.value(family.params, hidden)
    got = toys.score(family, rolled)
    for t in range(5):
        before = logprobs[:, 3 + t]  # P = 4: the response begins in slot 4
        chosen = before[jnp.arange(8), rolled.tokens[:, 4 + t]]
        np.testing.assert_allclose(got.logprobs[:, t], chosen, atol=2e-5)
        np.testing.assert_allclose(
            got.entropy[:, t], -(jnp.exp(before) * before).sum(-1), atol=2e-5
        )
        np.testing.assert_allclose(got.values[:, t], values[:, 3 + t], atol=2e-5)
    np.testing.assert_array_equal(got.raw_logprobs, got.logprobs)


@pytest.mark.ci
def test_without_a_critic_values_are_zero(llama):
    rolled = toys.roll(llama, toys.prompts())
    got = policy.response_logprobs(
        llama.model, llama.params, rolled, config=SETTINGS, with_values=False
    )
    assert not got.values.any()


@pytest.mark.ci
def test_chunks_change_nothing(llama):
    """40 rows of 11 logits are 1760 bytes: 450 bytes are 10 rows, so 4 chunks."""
    rolled = toys.roll(llama, toys.prompts())
    assert policy.number_of_chunks(40, 11, 450) == 4

    def loss(params, budget):
        got = policy.response_logprobs(
            llama.model, params, rolled, config=replace(SETTINGS, logits_bytes=budget)
        )
        return (jnp.sin(got.logprobs) + got.entropy + got.values).sum(), got

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    whole, chunked = run(llama.params, 2**20), run(llama.params, 450)
    toys.assert_close(whole[1], chunked[1], atol=1e-5)
    toys.assert_close(whole[0], chunked[0], atol=1e-4)


@pytest.mark.ci
def test_chunks_know_the_positions(llama):
    """Position 3 of each of 8 rows is in another chunk, and only positions 0 to 2 are barred."""
    settings = replace(SETTINGS, min_tokens=3)
    rolled = toys.roll(llama, toys.prompts(), settings)
    whole = toys.score(llama, rolled, settings)
    chunked = toys.score(llama, rolled, replace(settings, logits_bytes=450))
    toys.assert_close(whole, chunked, atol=1e-5)
    assert (whole.logprobs[:, :3] > whole.raw_logprobs[:, :3]).all()
    np.testing.assert_allclose(whole.logprobs[:, 3:], whole.raw_logprobs[:, 3:], atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "vocab", "budget", "chunks"),
    [
        (40, 11, 10**6, 1),
        (40, 11, 1759, 2),  # one byte short
        (40, 11, 600, 4),  # 3 would do, but 4 divides 40
        (7, 11, 300, 7),  # 2 would do; 7 is prime
        (40, 11, 1, 40),  # a row a chunk is the most
        (1, 50_000, 1, 1),
    ],
)
def test_number_of_chunks(rows, vocab, budget, chunks):
    assert policy.number_of_chunks(rows, vocab, budget) == chunks


def test_choices_with_a_temperature():
    logprob, raw, entropy = policy.choices(
        LOGITS, jnp.array([3]), config=replace(SETTINGS, temperature=0.5)
    )
    # squares .01 .04 .09 .16 over .30: .16 / .30 = .5333
    assert float(logprob[0]) == float(raw[0]) == pytest.approx(np.log(0.16 / 0.30), abs=1e-6)
    p = np.array([0.01, 0.04, 0.09, 0.16]) / 0.30
    assert float(entropy[0]) == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.6}])
def test_choices_in_a_keep_set(options):
    """.3 and .4 stay: the ratio's log-prob is renormalised, the KL's and the entropy are not."""
    logprob, raw, entropy = policy.choices(
        LOGITS, jnp.array([2]), config=replace(SETTINGS, **options)
    )
    assert float(logprob[0]) == pytest.approx(np.log(0.3 / 0.7), abs=1e-6)
    assert float(raw[0]) == pytest.approx(np.log(0.3), abs=1e-6)
    whole = policy.choices(LOGITS, jnp.array([2]), config=SETTINGS)
    assert float(entropy[0]) == float(whole[2][0])


def test_choices_with_a_barred_end_of_text():
    """Token 1 (.2) is the end of text: .3 / .8 at position 1, and .3 from position 2 on."""
    config = replace(SETTINGS, min_tokens=2, eos=1)
    rows = jnp.tile(LOGITS, (2, 1))
    logprob, raw, entropy = policy.choices(
        rows, jnp.array([2, 2]), config=config, t=jnp.array([1, 2])
    )
    np.testing.assert_allclose(logprob, np.log([0.3 / 0.8, 0.3]), atol=1e-6)
    np.testing.assert_allclose(raw, np.log([0.3, 0.3]), atol=1e-6)
    whole = policy.choices(LOGITS, jnp.array([2]), config=SETTINGS)
    np.testing.assert_array_equal(entropy, [whole[2][0]] * 2)


def test_a_token_outside_the_keep_set_is_floored_without_gradient():
    config = replace(SETTINGS, top_k=2)
    value, gradient = jax.value_and_grad(
        lambda z: policy.choices(z, jnp.array([0]), config=config)[0].sum()
    )(LOGITS)
    assert float(value) == policy.FLOOR == -20.0
    assert gradient.tolist() == [[0.0] * 4]


def test_gradient_inside_a_keep_set():
    """log .3/.7: 1 − 3/7 at the token, −4/7 at the other, nothing outside."""
    config = replace(SETTINGS, top_k=2)
    gradient = jax.grad(lambda z: policy.choices(z, jnp.array([2]), config=config)[0].sum())(LOGITS)
    np.testing.assert_allclose(gradient, [[0.0, 0.0, 4 / 7, -4 / 7]], atol=1e-6)


def test_cast_rounds_matrices_alone():
    params = {
        "embed": {"embedding": jnp.ones((3, 2))},
        "norm": {"scale": jnp.ones(2)},
        "value": {"kernel": jnp.ones((2, 1))},
    }
    out = policy.cast(params, jnp.bfloat16)
    assert out["embed"]["embedding"].dtype == jnp.bfloat16
    assert out["norm"]["scale"].dtype == out["value"]["kernel"].dtype == jnp.float32
    scanned = {
        "layers": {"norm": {"scale": jnp.ones((4, 2))}, "q": {"kernel": jnp.ones((4, 2, 2))}}
    }  # of four layers
    out = policy.cast(scanned, jnp.bfloat16)["layers"]
    assert out["norm"]["scale"].dtype == jnp.float32 and out["q"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.ci
def test_casting_twice_or_late_is_the_same():
    """Weights rounded once outside of the loop give what weights rounded at each product give."""
    toy = toys.llama("bfloat16")
    rolled = toys.roll(toy, toys.prompts())
    cast = policy.cast(toy.params, jnp.bfloat16)
    toys.assert_close(toys.score(toy, rolled), toys.score(toy, rolled, params=cast), atol=1e-6)
