"""Policies with audio: the encoder, the attention to it, and training steps on recordings."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import models, parallel, policy, supervised
from jaxppo.errors import UserError
from jaxppo.models import audio, critic, layers, shapes
from jaxppo.types import Prompts

BINS, FRAMES = 4, 12
LENGTHS = jnp.array([12, 5, 1], jnp.int32)


def audio_policy(kind: str, **changes) -> toys.Toy:
    sizes = {
        "vocab_size": toys.VOCAB,
        "width": 8,
        "num_layers": 1,
        "kernel": 3,
        "context_width": BINS,
        **changes,
    }
    shape = shapes.network(kind, context_length=2 * FRAMES, **sizes)
    model = models.make(shape)
    return toys.Toy(shape, model, toys.random_params(model))


@pytest.fixture(scope="module", params=["gru", "convolution"])
def toy(request) -> toys.Toy:
    return audio_policy(request.param)


@pytest.fixture(scope="module")
def gru() -> toys.Toy:
    return audio_policy("gru")


def recordings(rows: int = 3, frames: int = FRAMES, seed: int = 0) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(seed).standard_normal((rows, frames, BINS)), jnp.float32
    )


@cache
def program(model):
    return jax.jit(
        lambda params, tokens, mask, context: model.apply(params, tokens, mask, context=context)[0]
    )


def states(toy, prompts, *context):
    return program(toy.model)(toy.params, prompts.tokens, prompts.mask, context)


def encoded(toy, features, key=None) -> audio.EncodedAudio:
    encoder = audio.Encoder(toy.config, jnp.dtype("float32"))
    run = jax.jit(lambda params, x, key: encoder.apply({"params": params}, x, LENGTHS, key))
    return run(toy.params["encoder"], features, key)


def test_downsample():
    """Frames 1 to 5, four of them real: outputs at frames 1, 3 and 5, the last one padding."""
    x, real = jnp.arange(1.0, 6.0)[None, :, None], jnp.array([[True, True, True, True, False]])
    out, real_outputs = audio.downsample(x, real)
    assert out[0].tolist() == [[0, 1, 2], [2, 3, 4], [4, 0, 0]]
    assert real_outputs[0].tolist() == [True, True, False]


@pytest.mark.ci
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5), (3, 5), (5,)])
def test_cached_decoding_equals_the_full_pass(toy, cuts):
    """The recording is given with the first tokens only. Prompts and recordings are padded."""
    prompts, context = toys.ragged([3, 5, 1], 5), (recordings(), LENGTHS)
    want = states(toy, prompts, *context)
    cache, parts, start = toy.model.init_cache(3, 99), [], 0
    for end in cuts:
        tokens, mask = prompts.tokens[:, start:end], prompts.mask[:, start:end]
        hidden, cache = jax.jit(toy.model.apply)(
            toy.params, tokens, mask, cache=cache, context=context if start == 0 else None
        )
        parts.append(hidden)
        start = end
    np.testing.assert_allclose(
        jnp.concatenate(parts, 1)[prompts.mask], want[prompts.mask], atol=1e-5
    )


@pytest.mark.ci
def test_padded_frames_have_no_effect(toy):
    """Neither their values nor their number."""
    prompts, features = toys.ragged([3, 5, 1], 5), recordings()
    want = states(toy, prompts, features, LENGTHS)
    real = (jnp.arange(FRAMES)[None] < LENGTHS[:, None])[..., None]
    np.testing.assert_array_equal(
        states(toy, prompts, jnp.where(real, features, jnp.nan), LENGTHS), want
    )
    longer = jnp.pad(features, ((0, 0), (0, 7), (0, 0)), constant_values=3.0)
    np.testing.assert_allclose(states(toy, prompts, longer, LENGTHS), want, atol=1e-5)


@pytest.mark.ci
def test_every_state_attends_to_every_real_frame(gru):
    prompts, features = toys.ragged([3, 5, 1], 5), recordings()
    want = states(gru, prompts, features, LENGTHS)
    for row, frame, attends in (
        (0, 11, True),
        (0, 0, True),
        (1, 4, True),
        (1, 5, False),
        (2, 0, True),
        (2, 1, False),
    ):
        moved = states(gru, prompts, features.at[row, frame].add(1.0), LENGTHS) != want
        assert bool(moved[row].any(-1)[prompts.mask[row]].all()) == attends, (row, frame)
        assert not moved[jnp.arange(3) != row].any()


def test_the_recording_is_read_in_both_directions(gru):
    """The first output depends on the last real frame, and the last output on the first frame.
    12, 5 and 1 frames give 6, 3 and 1 outputs.
    """
    features = recordings()
    want = encoded(gru, features)
    assert want.keys.shape == (3, 1, 6, 8)
    assert want.real.sum(1).tolist() == [6, 3, 1]
    assert (encoded(gru, features.at[1, 4].add(1.0)).keys != want.keys)[1, 0, 0].any()
    assert (encoded(gru, features.at[1, 0].add(1.0)).keys != want.keys)[1, 0, 2].any()


def test_a_row_without_a_recording(gru):
    """Finite, and independent of the padding."""
    prompts, silent = toys.ragged([3, 5, 1], 5), jnp.zeros((3,), jnp.int32)
    one, other = (
        states(gru, prompts, recordings(), silent),
        states(gru, prompts, recordings(seed=1), silent),
    )
    assert np.isfinite(one).all()
    np.testing.assert_array_equal(one, other)


@pytest.mark.ci
def test_dropout_in_the_encoder(monkeypatch):
    """Before and after the recurrent layer, with different noise; none without a key."""
    asked = []

    def recorded(x, rate, key, number):
        asked.append((rate, number))
        return layers.dropout(x, rate, key, number)

    monkeypatch.setattr(audio, "dropout", recorded)
    toy = audio_policy("gru", dropout=0.5)
    run = lambda key: encoded(toy, recordings(), key).values
    one, same, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any() and (one != run(None)).any()
    assert {rate for rate, _ in asked} == {0.5} and {number for _, number in asked[-2:]} == {2, 3}


@pytest.mark.ci
def test_heads_and_bfloat16():
    """Two heads, all products in bfloat16: close to the same policy in float32."""
    shape = dataclasses.replace(audio_policy("lstm").config, num_heads=2)
    exact, rough = models.make(shape), models.make(shape, dtype="bfloat16", remat="block")
    params, prompts = toys.random_params(exact), toys.ragged([3, 5, 1], 5)
    one, other = (
        jax.jit(m.apply)(params, prompts.tokens, prompts.mask, context=(recordings(), LENGTHS))[0]
        for m in (exact, rough)
    )
    np.testing.assert_allclose(one, other, atol=0.1)
    assert (one != other).any()


def test_a_context_that_does_not_fit_is_refused(gru):
    prompts, plain = toys.ragged([3], 3), audio_policy("gru", context_width=0)
    with pytest.raises(UserError, match="this gru policy reads no context"):
        states(plain, prompts, recordings(1), LENGTHS[:1])
    with pytest.raises(UserError, match='its rows need "context" and "context_length"'):
        gru.model.apply(gru.params, prompts.tokens, prompts.mask)
    with pytest.raises(UserError, match='its rows need "context" and "context_length"'):
        gru.model.apply(gru.params, prompts.tokens, prompts.mask, cache=gru.model.init_cache(1, 9))
    with pytest.raises(UserError, match="3 numbers a frame, but the policy reads 4"):
        states(gru, prompts, recordings(1)[..., :3], LENGTHS[:1])
    with pytest.raises(UserError, match="25 frames, but the policy takes 24"):
        states(gru, prompts, recordings(1, 25), LENGTHS[:1])
    with pytest.raises(
        UserError, match="a transformer policy reads no context: use --model-kind gru"
    ):
        models.make(shapes.network("transformer", vocab_size=9, context_width=4))
    with pytest.raises(UserError, match="a transformer policy reads no context"):
        states(toys.llama(), prompts, recordings(1), LENGTHS[:1])


@pytest.mark.ci
def test_with_a_critic(gru):
    both = critic.with_critic(gru.model, gru.model, width=8)
    prompts, context = toys.ragged([3, 5, 1], 5), (recordings(), LENGTHS)
    params = {
        **{name: x for name, x in gru.params.items() if name != "value"},
        "critic": gru.params,
    }
    whole, _ = jax.jit(both.apply)(params, prompts.tokens, prompts.mask, context=context)
    np.testing.assert_allclose(
        both.value(params, whole),
        gru.model.value(gru.params, states(gru, prompts, *context)),
        atol=1e-5,
    )
    first, cache = jax.jit(both.apply)(
        params, prompts.tokens, prompts.mask, cache=both.init_cache(3, 9), context=context
    )
    np.testing.assert_allclose(first[prompts.mask], whole[prompts.mask], atol=1e-5)
    again, _ = jax.jit(both.apply)(params, prompts.tokens[:, :1], prompts.mask[:, -1:], cache=cache)
    assert np.isfinite(again).all()


# --- a code to copy: each segment of four frames has one loud bin, which stands for one token


SEGMENTS = 3
COPY = dataclasses.replace(
    toys.SETTINGS,
    batch_size=16,
    prompt_length=1,
    response_length=SEGMENTS + 1,
    epochs=1,
    minibatches=1,
    lr=2e-2,
    lr_schedule="linear",
    steps=200,
)


def codes(seed: int, rows: int = COPY.batch_size) -> tuple[np.ndarray, dict]:
    """(one to three digits a row, −1 after the last; the recording of them, with noise as
    padding).
    """
    rng = np.random.default_rng(seed)
    digits = rng.integers(0, BINS, (rows, SEGMENTS))
    length = rng.integers(1, SEGMENTS + 1, rows)
    features = np.eye(BINS, dtype=np.float32)[digits.repeat(4, 1)]
    real = np.arange(4 * SEGMENTS)[None] < 4 * length[:, None]
    noise = rng.standard_normal(features.shape)
    features = np.where(real[..., None], features, noise).astype(np.float32)
    extra = {"context": jnp.asarray(features), "context_length": jnp.asarray(4 * length, jnp.int32)}
    return np.where(np.arange(SEGMENTS)[None] < length[:, None], digits, -1), extra


def rows_of(seed: int) -> Prompts:
    """Training rows: a start (2), the digits as tokens 3 to 6, the end; padded on the left."""
    digits, extra = codes(seed)
    tokens = np.zeros((len(digits), COPY.length), np.int32)
    for row, own in enumerate(digits):
        text = [2, *(own[own >= 0] + 3), toys.EOS]
        tokens[row, -len(text) :] = text
    mask = jnp.asarray(tokens > 0)
    index = jnp.arange(len(digits), dtype=jnp.int32)
    return Prompts(jnp.asarray(tokens), mask, index, {"weight": mask.astype(jnp.float32), **extra})


@pytest.fixture(scope="module")
def copier() -> tuple[toys.Toy, list[float]]:
    """A policy that has learned to copy, and its losses."""
    shape = shapes.network("gru", vocab_size=toys.VOCAB, width=16, num_layers=1, context_width=BINS)
    model = models.make(shape)
    toy = toys.Toy(shape, model, jax.jit(model.init)(jax.random.key(0)))
    step = parallel.compile_step(
        supervised.make_train_step(model, supervised.language_model(model, COPY), COPY)
    )
    state, losses = toys.state(toy, COPY), []
    for number in range(COPY.steps):
        state, metrics = step(state, rows_of(number))
        losses.append(float(metrics["loss"]))
    return toy._replace(params=jax.device_get(state.params)), losses


@pytest.mark.ci
@pytest.mark.learning
def test_a_code_is_copied_from_the_recording(copier):
    """The loss falls below the entropy of the digits, so the policy uses the recording. New codes
    are sampled without errors.
    """
    toy, losses = copier
    assert np.mean(losses[-5:]) < 0.1 < 1.0 < losses[0]
    digits, extra = codes(10**6)
    start = Prompts(
        jnp.full((16, 1), 2), jnp.ones((16, 1), bool), jnp.arange(16, dtype=jnp.int32), extra
    )
    sampled = np.asarray(toys.roll(toy, start, COPY, greedy=True).response)
    want = [[*(own[own >= 0] + 3), toys.EOS] for own in digits]
    right = sum(sampled[row, : len(own)].tolist() == own for row, own in enumerate(want))
    assert right >= 15


@pytest.mark.ci
def test_a_ppo_step(gru):
    """The first ratio is 1 within 1e-4, and encoder and attention learn, with NLPO's lagged policy
    and with microbatches, which take the recordings of their own rows.
    """
    settings = dataclasses.replace(COPY, mask_top_p=0.9, minibatches=2, microbatches=2)
    start = Prompts(
        jnp.full((16, 1), 2), jnp.ones((16, 1), bool), jnp.arange(16, dtype=jnp.int32), codes(0)[1]
    )
    state, metrics = toys.step(gru, settings)(toys.state(gru, settings), start)
    assert float(metrics["first_ratio_off"]) < 1e-4 and float(metrics["skipped"]) == 0
    for part in ("encoder", "listening"):
        moved = jax.tree.map(
            lambda a, b: bool((np.asarray(a) != b).any()), state.params[part], gru.params[part]
        )
        assert all(jax.tree.leaves(moved)), moved


@pytest.mark.ci
def test_sampler_and_scorer_use_the_same_recording(gru):
    start = Prompts(
        jnp.full((16, 1), 2), jnp.ones((16, 1), bool), jnp.arange(16, dtype=jnp.int32), codes(0)[1]
    )
    rolled = toys.roll(gru, start, COPY)
    np.testing.assert_allclose(
        toys.score(gru, rolled, COPY).logprobs * rolled.mask, rolled.logprobs, atol=1e-5
    )
    other = rolled.replace(extra=codes(1)[1])
    assert (jnp.abs(toys.score(gru, other, COPY).logprobs - rolled.logprobs)[:, 0] > 1e-4).all()
    exact = jax.jit(
        lambda rolled: policy.full_kl(gru.model, gru.params, gru.params, rolled, config=COPY)
    )
    np.testing.assert_allclose(exact(rolled), 0.0, atol=1e-6)


@pytest.mark.ci
def test_eight_devices_are_one(gru):
    objective = supervised.language_model(gru.model, COPY)
    make = lambda axis_name: supervised.make_train_step(
        gru.model, objective, COPY, axis_name=axis_name
    )
    one, many = (
        parallel.compile_for_mode(make, mode="jit"),
        parallel.compile_for_mode(make, mode="pmap"),
    )
    want, metrics = one(toys.state(gru, COPY), rows_of(0))
    state, got = many(many.place(toys.state(gru, COPY)), many.put(jax.device_get(rows_of(0))))
    toys.assert_close(many.unreplicate(state).params, want.params, atol=2e-5)
    np.testing.assert_allclose(got["loss"], metrics["loss"], rtol=1e-5)
