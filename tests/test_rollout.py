from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from tokenizers import models
from toys import EOS, SETTINGS, VOCAB

from jaxppo import policy, rollout, sampling
from jaxppo.decoding import loop
from jaxppo.models import int8, lora
from jaxppo.pretrained import token_bytes
from jaxppo.pretrained.tokenizer import Tokenizer, byte_level

# Twelve tokens: most rows end somewhere inside.
LONG = replace(SETTINGS, response_length=12)


@pytest.fixture(scope="module")
def rolled(family):
    return toys.roll(family, toys.prompts(), LONG)


def assert_scores_agree(toy, rolled, settings, tolerance):
    scored = toys.score(toy, rolled, settings)
    on = np.asarray(rolled.mask) > 0
    for name in ("logprobs", "raw_logprobs", "values"):
        np.testing.assert_allclose(
            np.asarray(getattr(rolled, name))[on],
            np.asarray(getattr(scored, name))[on],
            atol=tolerance,
        )
        assert not np.asarray(getattr(rolled, name))[~on].any()
    ratio = jnp.exp(scored.logprobs - rolled.logprobs)[on]
    np.testing.assert_allclose(ratio, 1.0, atol=tolerance)


@pytest.mark.ci
def test_the_entropy_is_kept_where_something_reads_it(llama):
    settings = replace(SETTINGS, top_entropy=0.5)
    rolled = toys.roll(llama, toys.prompts(), settings)
    want = toys.score(llama, rolled).entropy * rolled.mask
    np.testing.assert_allclose(rolled.entropy, want, atol=1e-5)
    assert toys.roll(llama, toys.prompts()).entropy is None


@pytest.mark.ci
def test_rows_have_limits_of_their_own(llama):
    """Limits of 1, 2, ... 8 tokens, and at most 5 of all."""
    prompts = toys.prompts().replace(extra={"max_tokens": 1 + jnp.arange(8)})
    rolled = toys.roll(llama, prompts, eos=-1)
    assert rolled.mask.sum(1).tolist() == [1, 2, 3, 4, 5, 5, 5, 5]
    assert not rolled.finished.any()


def test_sampler_and_scorer_agree(family, rolled):
    assert_scores_agree(family, rolled, LONG, 1e-4)


@pytest.mark.ci
@pytest.mark.parametrize("options", [{"top_k": 3, "temperature": 1.5}, {"top_p": 0.7}])
def test_sampler_and_scorer_agree_in_a_keep_set(llama, options):
    settings = replace(LONG, **options)
    rolled = toys.roll(llama, toys.prompts(), settings)
    assert_scores_agree(llama, rolled, settings, 1e-4)
    on = rolled.mask > 0
    assert (rolled.logprobs >= rolled.raw_logprobs - 1e-5)[on].all()  # fewer tokens share the whole
    assert (rolled.logprobs > policy.FLOOR)[
        on
    ].all()  # nothing was sampled outside of its own keep-set


@pytest.mark.ci
def test_sampler_and_scorer_agree_in_bfloat16():
    toy = toys.llama("bfloat16")
    assert_scores_agree(toy, toys.roll(toy, toys.prompts(), LONG), LONG, 5e-2)


def test_mask_ends_with_the_end_of_text(rolled):
    ended = 0
    for tokens, mask, finished in zip(
        np.asarray(rolled.response), np.asarray(rolled.mask), rolled.finished, strict=True
    ):
        length = int(mask.sum())
        assert mask.tolist() == [1.0] * length + [0.0] * (12 - length)
        assert bool(finished) == (tokens[length - 1] == EOS)
        assert EOS not in tokens[: length - 1]
        assert (tokens[length:] == LONG.pad).all()
        ended += bool(finished)
    assert 0 < ended < 8, "choose another key: this test needs rows of both kinds"


def test_rollout_keeps_the_prompt(rolled):
    prompts = toys.prompts()
    np.testing.assert_array_equal(rolled.tokens[:, :4], prompts.tokens)
    np.testing.assert_array_equal(
        rolled.attend, jnp.concatenate([prompts.mask, rolled.mask > 0], 1)
    )


@pytest.mark.ci
def test_pad_may_equal_the_end_of_text(llama):
    """The mask comes from `finished`: nothing but the written pad changes."""
    other = toys.roll(llama, toys.prompts(), LONG, pad=EOS)
    one = toys.roll(llama, toys.prompts(), LONG)
    np.testing.assert_array_equal(other.response, jnp.where(one.mask == 0, EOS, one.response))
    toys.assert_same(one.replace(tokens=None), other.replace(tokens=None))


@pytest.fixture(scope="module")
def decode(llama):
    """The decode loop's last state, for prompts and an end of text."""

    @jax.jit
    def run(prompts, eos):
        noise = sampling.row_uniforms(jax.random.key(7), prompts.index, 12)
        decoder = loop.Decoder(llama.model, llama.params, LONG, 12, eos, 0, True, False, None, None)
        start = loop.prefill(decoder, prompts, noise, group_size=None)
        return loop.decode(decoder, *start, group_size=None)

    return run


def rows(prompts, chosen):
    return jax.tree.map(lambda x: x[jnp.asarray(chosen)], prompts)


@pytest.mark.ci
def test_decoding_stops_when_all_rows_have_ended(decode):
    """The cache holds the prompt and every chosen token but the last, which nobody has to look
    at.
    """
    full = decode(toys.prompts(), -1)
    assert int(full.t) == 12 and int(full.cache.filled) == 4 + 11
    first = full.tokens[0, 0]  # row 0 ends at once if this ends the text
    done = decode(rows(toys.prompts(), [0] * 8), first)
    assert done.finished.all()
    assert int(done.t) == 1 and int(done.cache.filled) == 4


def test_decoding_goes_on_for_the_slowest_row(decode):
    done = decode(toys.prompts(), EOS)
    lengths = done.mask.sum(1)
    assert int(done.t) == 12 and not done.finished.all()
    ended = np.flatnonzero(done.finished)
    alone = decode(rows(toys.prompts(), np.resize(ended, 8)), EOS)
    slowest = int(lengths[ended].max())
    assert int(alone.t) == slowest < 12
    assert int(alone.cache.filled) == 4 + slowest - 1


@pytest.mark.ci
def test_more_padding_changes_nothing(family, rolled):
    prompts = toys.prompts()
    wider = toys.roll(family, replace_width(prompts, 7), LONG)
    np.testing.assert_array_equal(wider.response, rolled.response)
    np.testing.assert_array_equal(wider.finished, rolled.finished)
    for name in ("logprobs", "ref_logprobs", "values"):
        np.testing.assert_allclose(getattr(wider, name), getattr(rolled, name), atol=1e-5)


def replace_width(prompts, width):
    more = width - prompts.tokens.shape[1]
    # Padding may hold any token: it is not attended to.
    return prompts.replace(
        tokens=jnp.pad(prompts.tokens, ((0, 0), (more, 0)), constant_values=9),
        mask=jnp.pad(prompts.mask, ((0, 0), (more, 0))),
    )


def test_the_token_in_the_padding_changes_nothing(family, rolled):
    prompts = toys.prompts()
    filled = prompts.replace(tokens=jnp.where(prompts.mask, prompts.tokens, 8))
    other = toys.roll(family, filled, LONG)
    np.testing.assert_array_equal(other.response, rolled.response)
    toys.assert_same(other.replace(tokens=None), rolled.replace(tokens=None))


def test_the_order_of_the_batch_changes_nothing(family, rolled):
    order = jnp.array([5, 2, 7, 0, 1, 6, 3, 4])
    shuffled = toys.roll(family, rows(toys.prompts(), order), LONG)
    expected = rows(rolled, order)
    np.testing.assert_array_equal(shuffled.tokens, expected.tokens)
    toys.assert_close(shuffled, expected, atol=1e-5)


def test_other_rows_change_nothing(family, rolled):
    """Rows 0 to 3 beside other prompts, and row 0 beside itself."""
    prompts, others = toys.prompts(), toys.prompts(seed=1)
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:4], b[4:]]), prompts, others)
    first = [0, 1, 2, 3]
    toys.assert_close(rows(toys.roll(family, mixed, LONG), first), rows(rolled, first), atol=1e-5)
    toys.assert_close(
        toys.roll(family, rows(prompts, [0] * 8), LONG), rows(rolled, [0] * 8), atol=1e-5
    )


@pytest.mark.ci
def test_samples_follow_the_model(llama):
    """First tokens of 4096 rows with the same prompt against softmax."""
    n = 4096
    prompts = toys.ragged([3], 4)
    prompts = jax.tree.map(lambda x: x.repeat(n, 0), prompts).replace(
        index=jnp.arange(n, dtype=jnp.int32)
    )
    settings = replace(SETTINGS, response_length=1, temperature=0.8)
    done = toys.roll(llama, prompts, settings)
    hidden, _ = llama.model.apply(llama.params, prompts.tokens[:1], prompts.mask[:1])
    expected = n * np.asarray(
        jax.nn.softmax(llama.model.logits(llama.params, hidden[0, -1]) / 0.8), np.float64
    )
    counts = np.bincount(done.response[:, 0], minlength=VOCAB)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 10) < 5 * 20**0.5  # mean V − 1, variance 2 (V − 1)


@pytest.mark.ci
def test_greedy_is_the_argmax_of_the_scorer(llama):
    done = toys.roll(llama, toys.prompts(), SETTINGS, greedy=True)
    hidden, _ = llama.model.apply(llama.params, done.tokens, done.attend)
    best = llama.model.logits(llama.params, hidden[:, 3:-1]).argmax(-1)
    on = done.mask > 0
    np.testing.assert_array_equal(done.response[on], best[on])
    assert not done.ref_logprobs.any()
    toys.assert_same(
        done, toys.roll(llama, toys.prompts(), SETTINGS, greedy=True, key=8)
    )  # no noise in it


def test_another_key_samples_other_tokens(llama):
    one, other = (toys.roll(llama, toys.prompts(), LONG, key=k) for k in (1, 2))
    assert (one.response != other.response).any()


@pytest.mark.ci
def test_reference_is_scored_with_the_temperature_only(llama):
    settings = replace(LONG, top_k=3, temperature=1.5)
    reference = toys.random_params(llama.model, seed=5)
    done = toys.roll(llama, toys.prompts(), settings, reference=reference)
    want = toys.score(llama, done, settings, reference).raw_logprobs * done.mask
    np.testing.assert_allclose(done.ref_logprobs, want, atol=1e-5)
    assert (jnp.abs(done.ref_logprobs - done.raw_logprobs)[done.mask > 0] > 1e-3).any()


@pytest.mark.ci
def test_the_reference_of_adapters_is_the_base():
    toy = toys.make(toys.LLAMA, lora=2)
    trained, base = lora.split(toy.params, lora.is_trained)
    noise = sampling.row_uniforms(jax.random.key(0), jnp.arange(8), 5)
    run = jax.jit(partial(rollout.rollout, toy.model, length=5, sample=SETTINGS, eos=EOS, pad=0))
    done = run(trained, {"base": base, "reference": None}, toys.prompts(), noise)
    plain = toys.llama()
    want = (
        toys.score(plain, done, SETTINGS, base | {"value": trained["value"]}).raw_logprobs
        * done.mask
    )
    np.testing.assert_allclose(done.ref_logprobs, want, atol=1e-5)
    assert (
        jnp.abs(done.raw_logprobs - done.ref_logprobs)[done.mask > 0] > 1e-3
    ).any()  # the adapters do something


@pytest.mark.ci
def test_one_stop_for_all_programs_of_an_axis(llama):
    """Under vmap with `stop_axis` the loop's condition is not batched, and the result is that of
    each alone.
    """

    def program(seed):
        noise = sampling.row_uniforms(jax.random.key(seed), jnp.arange(8), 12)
        frozen = {"base": {}, "reference": llama.params}
        return rollout.rollout(
            llama.model,
            llama.params,
            frozen,
            toys.prompts(),
            noise,
            length=12,
            sample=LONG,
            eos=EOS,
            pad=0,
            stop_axis="seeds",
        )

    many = jax.vmap(program, axis_name="seeds")
    together = jax.jit(many)(jnp.arange(3))
    for i in range(3):
        toys.assert_close(
            rows(together, i), toys.roll(llama, toys.prompts(), LONG, key=i), atol=1e-5
        )
    conditions = [
        eqn.params["cond_jaxpr"].out_avals[0].shape
        for eqn in all_loops(jax.make_jaxpr(many)(jnp.arange(3)))
    ]
    assert set(conditions) == {()}


def all_loops(closed):
    for eqn in closed.jaxpr.eqns:
        if eqn.primitive.name == "while" and "cond_jaxpr" in eqn.params:
            yield eqn


EIGHT = {"old_logprobs": "scorer", "decode_dtype": "int8"}


def eight_bits(toy):
    """The toy's policy with the numbers that 8 bits hold."""
    small = int8.sampling_weights(toy.params, alpha=16.0)
    return toy._replace(params=lora.fold(small, alpha=1.0))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("lora_rank", "scan", "options"),
    [
        (0, False, {"layout": "dense"}),
        (2, True, {"group_size": 4, "lora": 2}),
        (0, True, {"top_k": 4, "top_p": 0.9, "min_tokens": 2}),
    ],
    ids=str,
)
def test_int8_decoding_samples_from_the_rounded_weights(lora_rank, scan, options):
    """Tokens and log-probs are those of a network with these weights; the critic's values are
    left to the scorer.
    """
    toy = toys.make(toys.LLAMA, lora=lora_rank, scan=scan)
    settings = replace(LONG, **EIGHT, **options)
    size = settings.group_size
    got = toys.roll(toy, toys.grouped(size), settings, decode_dtype="int8", group_size=size)
    same = {"reference": toy.params, "group_size": size}
    want = toys.roll(eight_bits(toy), toys.grouped(size), settings, **same)
    toys.assert_same((got.tokens, got.mask), (want.tokens, want.mask))
    for name in ("logprobs", "raw_logprobs", "ref_logprobs"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-5)
    assert not got.values.any() and want.values.any()
    plain = toys.roll(toy, toys.grouped(size), settings, group_size=size)
    assert (plain.logprobs != got.logprobs).any()


def rescored(toy, rolled, settings, **options):
    frozen, options = {"base": {}, "reference": None}, {"with_values": True} | options
    own = partial(rollout.rescore, toy.model, config=settings, **options)
    return jax.jit(own)(toy.params, frozen, rolled)


@pytest.mark.ci
@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_rescoring_leaves_the_sampler_its_log_probs_alone(llama, layout):
    settings = replace(LONG, **EIGHT, layout=layout, top_entropy=0.5)
    rolled = toys.roll(llama, toys.prompts(), settings, decode_dtype="int8")
    got, own = rescored(llama, rolled, settings), toys.score(llama, rolled, settings)
    toys.assert_same(got.logprobs, rolled.logprobs)
    for name in ("raw_logprobs", "values", "entropy"):
        want = getattr(own, name) * rolled.mask
        np.testing.assert_allclose(getattr(got, name), want, atol=1e-5)
        assert jnp.abs(getattr(got, name) - getattr(rolled, name)).max() > 1e-3
    np.testing.assert_allclose(got.old_logprobs, own.logprobs * rolled.mask, atol=1e-5)


@pytest.mark.ci
def test_rescoring_a_usual_sampler_adds_old_log_probs_alone(llama):
    settings = replace(LONG, old_logprobs="scorer")
    rolled = toys.roll(llama, toys.prompts(), settings)
    got = rescored(llama, rolled, settings)
    toys.assert_same(got.replace(old_logprobs=None), rolled)
    np.testing.assert_allclose(got.old_logprobs, rolled.logprobs, atol=1e-4)


def test_a_row_that_the_scorer_cannot_score_is_not_finite(llama):
    rolled = toys.roll(llama, toys.prompts())
    old = rolled.logprobs.at[3, 0].set(jnp.nan)
    got, good = rollout.replace_nonfinite(rolled.replace(old_logprobs=old))
    assert (~good).nonzero()[0].tolist() == [3]
    assert not got.old_logprobs[3].any() and not got.logprobs[3].any()


@pytest.mark.ci
def test_int8_decoding_of_several_policies_at_once(llama):
    """Each of a sweep has its own weights in 8 bits."""
    both = [toys.random_params(llama.model, seed) for seed in (0, 5)]
    settings = replace(LONG, **EIGHT)

    def program(params):
        noise = sampling.row_uniforms(jax.random.key(7), jnp.arange(8), 12)
        frozen = {"base": {}, "reference": llama.params}
        options = {"length": 12, "sample": settings, "stop_axis": "seeds", "decode_dtype": "int8"}
        return rollout.rollout(llama.model, params, frozen, toys.prompts(), noise, **options)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *both)
    many = jax.jit(jax.vmap(program, axis_name="seeds"))(stacked)
    for i, params in enumerate(both):
        own = eight_bits(llama._replace(params=params))
        want = toys.roll(own, toys.prompts(), settings, reference=llama.params)
        toys.assert_close(rows(many, i).replace(values=want.values), want, atol=1e-5)


# The bytes of the eleven tokens; the stop text `bc` is in `cabc`, in `ab` and `ca`, ...
SPELLED = ["x", "E", "a", "ab", "bc", "c", "cabc", "b", "Ġa", "Ã", "©"]
STOPPING = replace(LONG, stop=("bc",))


@pytest.fixture(scope="module")
def stops():
    backend = byte_level(models.BPE({token: i for i, token in enumerate(SPELLED)}, []))
    return token_bytes.make_stops(["bc"], Tokenizer(backend, eos_id=EOS), vocab_size=VOCAB)


def roll_stopping(toy, prompts, stops, settings=STOPPING, *, key=7, **options):
    frozen = {"base": {}, "reference": toy.params, "stop": stops}

    @jax.jit
    def program(frozen):
        noise = sampling.row_uniforms(jax.random.key(key), prompts.index, 12)
        return rollout.rollout(
            toy.model, toy.params, frozen, prompts, noise, length=12, sample=settings, **options
        )

    return program(frozen)


def end_of(tokens, at_least=0) -> int:
    """The number of tokens of a response that would have these; one more if it does not end."""
    for t, token in enumerate(tokens):
        text = "".join(SPELLED[x] for x in tokens[: t + 1])
        before = "".join(SPELLED[x] for x in tokens[:t])
        ended = token == EOS or text.count("bc") > before.count("bc")
        if ended and t >= at_least:
            return t + 1
    return len(tokens) + 1


def lengths_of(done) -> list[int]:
    return [int(n) + (not ended) for n, ended in zip(done.mask.sum(1), done.finished, strict=True)]


@pytest.mark.ci
def test_a_response_ends_with_a_stop_text(llama, stops):
    """With the token that completes it, over several tokens and inside of one. Tokens until then
    are those of a response without it.
    """
    prompts = toys.prompts(rows=32)
    whole = toys.roll(llama, prompts, LONG)
    done = roll_stopping(llama, prompts, stops)
    assert lengths_of(done) == [end_of(row) for row in whole.response.tolist()]
    on = done.mask > 0
    np.testing.assert_array_equal(done.response[on], whole.response[on])
    assert (done.response[~on] == LONG.pad).all()
    by_text = done.finished & ~(done.response == EOS).any(1)
    assert by_text.any() and (done.finished & ~by_text).any(), "choose another key"


@pytest.mark.ci
def test_a_stop_text_in_the_prompt_is_no_end(llama, stops):
    """The prompts end with `bc` and `b`, and a response that begins with `c` goes on."""
    rows = 64
    prompts = toys.ragged([4] * rows, 4)
    prompts = prompts.replace(tokens=jnp.tile(jnp.array([[4, 2, 4, 7]]), (rows, 1)))
    done = roll_stopping(llama, prompts, stops)
    first = done.response[:, 0]
    assert (first == 5).any(), "choose another key"
    ended = np.isin(first, [EOS, 4, 6])  # `E`, `bc`, `cabc`
    np.testing.assert_array_equal(done.mask[:, 1] == 0, ended)


@pytest.mark.ci
def test_a_stop_text_is_an_end_from_min_tokens_on(llama, stops):
    """Tokens 0 to 4 do not end a response."""
    settings = replace(STOPPING, min_tokens=5)
    done = roll_stopping(llama, toys.prompts(), stops, settings)
    whole = toys.roll(llama, toys.prompts(), replace(LONG, min_tokens=5))
    assert lengths_of(done) == [end_of(row, 5) for row in whole.response.tolist()]
    text = lambda row: "".join(SPELLED[x] for x in row[:5])
    assert any("bc" in text(row) for row in done.response.tolist()), "choose another key"


def test_stop_texts_need_their_table(llama):
    with pytest.raises(ValueError, match=r'need frozen\["stop"\]'):
        toys.roll(llama, toys.prompts(), STOPPING)


@pytest.mark.ci
def test_stop_texts_under_vmap(llama, stops):
    """Runs of other keys, with the loop's condition of each and of all."""

    def program(axis, seed):
        noise = sampling.row_uniforms(jax.random.key(seed), jnp.arange(8), 12)
        frozen = {"base": {}, "reference": llama.params, "stop": stops}
        options = {"length": 12, "sample": STOPPING, "stop_axis": axis}
        return rollout.rollout(llama.model, llama.params, frozen, toys.prompts(), noise, **options)

    for axis in (None, "seeds"):
        many = jax.jit(jax.vmap(partial(program, axis), axis_name="seeds"))(jnp.arange(3))
        for i in range(3):
            alone = roll_stopping(llama, toys.prompts(), stops, key=i)
            toys.assert_close(rows(many, i), alone, atol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "temperature": 1.5}, {"top_p": 0.7}], ids=str)
def test_min_tokens(llama, options):
    """The end of text comes from token 4 on; sampler and scorer agree, and the log-probs of the KL
    are those of the whole vocabulary.
    """
    settings = replace(LONG, min_tokens=4, **options)
    done = toys.roll(llama, toys.prompts(), settings)
    assert (done.mask.sum(1) > 4).all() and not (done.response[:, :4] == EOS).any()
    assert_scores_agree(llama, done, settings, 1e-4)
    raw = toys.score(llama, done, replace(settings, min_tokens=0)).raw_logprobs
    np.testing.assert_allclose(done.raw_logprobs, raw * done.mask, atol=1e-5)
    if not options:
        assert done.finished.any(), "choose another key"
        off = done.logprobs - done.raw_logprobs  # −log(1 − p(end of text))
        assert (off[:, :4] > 1e-5).all()
        np.testing.assert_allclose(off[:, 4:], 0.0, atol=1e-5)


@pytest.mark.ci
def test_a_greedy_response_has_min_tokens(llama):
    """A token that is greedily chosen first is made the end of text."""
    plain = toys.roll(llama, toys.prompts(), LONG, greedy=True)
    settings = replace(LONG, eos=int(plain.response[0, 0]))
    short = toys.roll(llama, toys.prompts(), settings, greedy=True)
    assert int(short.mask[0].sum()) == 1
    done = toys.roll(llama, toys.prompts(), replace(settings, min_tokens=3), greedy=True)
    assert (done.mask.sum(1) > 3).all()


@pytest.mark.ci
def test_any_of_several_ends_of_text_finishes_a_row(llama):
    """And with min_tokens none of them comes early, for the scorer as for the sampler."""
    settings = replace(LONG, eos=(EOS, 5, 7))
    rolled = toys.roll(llama, toys.prompts(), settings)
    for tokens, mask, finished in zip(
        np.asarray(rolled.response), np.asarray(rolled.mask), rolled.finished, strict=True
    ):
        length = int(mask.sum())
        assert not np.isin(tokens[: length - 1], settings.eos).any()
        assert bool(finished) == (tokens[length - 1] in settings.eos)
    ends = np.asarray(rolled.response)[np.arange(8), np.asarray(rolled.mask).sum(1).astype(int) - 1]
    assert len(np.intersect1d(ends, settings.eos)) > 1, "choose another key: one end of several"
    held = replace(settings, min_tokens=4)
    late = toys.roll(llama, toys.prompts(), held)
    assert not np.isin(late.response[:, :4], settings.eos).any() and (late.mask[:, :5] == 1).all()
    assert_scores_agree(llama, late, held, 1e-4)
