"""Every architecture except the transformer, through the common interface."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import config, models, parallel, ppo, supervised
from jaxppo.errors import UserError
from jaxppo.models import critic, shapes
from jaxppo.types import Prompts

KINDS = ("gru", "lstm", "convolution", "window")


# The fast tests train one of the kinds.
trained = pytest.mark.parametrize(
    "toy",
    [
        "gru",
        *(pytest.param(kind, marks=pytest.mark.ci) for kind in ("lstm", "convolution", "window")),
    ],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module", params=KINDS)
def toy(request) -> toys.Toy:
    shape = shapes.network(
        request.param, vocab_size=toys.VOCAB, width=8, num_layers=2, kernel=3, max_length=32
    )
    model = models.make(shape)
    return toys.Toy(shape, model, toys.random_params(model))


def forward(toy, tokens, mask):
    hidden, _ = jax.jit(toy.model.apply)(toy.params, tokens, mask)
    return toy.model.logits(toy.params, hidden), toy.model.value(toy.params, hidden)


@pytest.mark.ci
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5), (3, 5), (5,)])
def test_cached_decoding_equals_the_full_pass(toy, cuts):
    prompts = toys.ragged([3, 5, 1], 5)
    want, _ = jax.jit(toy.model.apply)(toy.params, prompts.tokens, prompts.mask)
    cache, parts, start = toy.model.init_cache(3, 99), [], 0
    for end in cuts:
        hidden, cache = jax.jit(toy.model.apply)(
            toy.params, prompts.tokens[:, start:end], prompts.mask[:, start:end], cache=cache
        )
        parts.append(hidden)
        start = end
    np.testing.assert_allclose(
        jnp.concatenate(parts, 1)[prompts.mask], want[prompts.mask], atol=1e-5
    )


@pytest.mark.ci
def test_padding_has_no_effect(toy):
    """Three more slots on the left, with any tokens."""
    prompts = toys.ragged([4, 2], 4)
    wide = jnp.pad(prompts.tokens, ((0, 0), (3, 0)), constant_values=7)
    one, other = (
        forward(toy, prompts.tokens, prompts.mask),
        forward(toy, wide, jnp.pad(prompts.mask, ((0, 0), (3, 0)))),
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(b[:, 3:][prompts.mask], a[prompts.mask], atol=1e-5)


def test_causality(toy):
    prompts = toys.ragged([6], 6)
    changed = prompts.tokens.at[0, 3].set((prompts.tokens[0, 3] + 1) % toys.VOCAB)
    (one, _), (other, _) = (
        forward(toy, prompts.tokens, prompts.mask),
        forward(toy, changed, prompts.mask),
    )
    np.testing.assert_array_equal(one[:, :3], other[:, :3])
    # and what comes after does look back: kernel 3, one layer or more
    assert (one[:, 3:] != other[:, 3:]).any((0, 2)).all()


@pytest.mark.ci
@trained
def test_a_ppo_step(toy):
    """Sampler and scorer agree to 1e-4, and every parameter of policy and critic changes."""
    step = parallel.compile_step(ppo.make_train_step(toy.model, toys.parts(), toys.SETTINGS))
    before = jax.device_get(toy.params)
    state, metrics = step(toys.state(toy), toys.prompts())
    assert float(metrics["first_ratio_off"]) < 1e-4 and float(metrics["skipped"]) == 0
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, before)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.ci
def test_as_a_critic_of_another_policy(toy):
    """A transformer with a critic of another kind."""
    actor = toys.llama()
    both = critic.with_critic(actor.model, toy.model, width=actor.config.width)
    params = {
        **{name: x for name, x in actor.params.items() if name != "value"},
        "critic": toy.params,
    }
    prompts = toys.prompts()
    hidden, _ = jax.jit(both.apply)(params, prompts.tokens, prompts.mask)
    _, want = forward(toy, prompts.tokens, prompts.mask)
    np.testing.assert_allclose(both.value(params, hidden), want, rtol=1e-6)


@pytest.mark.ci
@trained
def test_a_label_is_learned(toy):
    """The label says whether the last token but one is 3 or 4. After 60 steps the value of the last
    token is right for all rows.
    """
    settings = config.Config(
        batch_size=16,
        prompt_length=2,
        response_length=4,
        epochs=1,
        minibatches=1,
        steps=60,
        lora=0,
        lr=3e-2,
        lr_schedule="constant",
    )
    tokens = np.random.default_rng(0).integers(5, toys.VOCAB, (16, 6)).astype(np.int32)
    label = np.arange(16) % 2
    tokens[:, 4] = np.where(label, 3, 4)
    extra = {"label": jnp.asarray(label, jnp.float32)}
    rows = Prompts(
        jnp.asarray(tokens), jnp.ones((16, 6), bool), jnp.arange(16, dtype=jnp.int32), extra
    )
    step = parallel.compile_step(
        supervised.make_train_step(toy.model, supervised.binary_cross_entropy(toy.model), settings)
    )
    state = ppo.init_state(
        settings,
        toys.copied(toy.params),
        {"base": {}, "reference": None, "reward": {}},
        jax.random.key(0),
    )
    for _ in range(60):
        state, metrics = step(state, rows)
    assert float(metrics["accuracy"]) == 1.0 and float(metrics["loss"]) < 0.1


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_dropout(kind):
    """With a key half of the last hidden states are 0, with another key others; without a key
    none.
    """
    shape = shapes.network(kind, vocab_size=toys.VOCAB, width=8, num_layers=1, dropout=0.5)
    model = models.make(shape)
    params, prompts = toys.random_params(model), toys.prompts()
    run = lambda key: jax.jit(model.apply)(params, prompts.tokens, prompts.mask, dropout_key=key)[0]
    one, same, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    assert (run(None) != 0).all()
    # of 256 numbers: three deviations are .09
    assert float((one == 0).mean()) == pytest.approx(0.5, abs=0.15)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.ci
def test_bfloat16_and_an_untied_head(strict):
    import dataclasses

    shape = dataclasses.replace(shapes.network("lstm", vocab_size=toys.VOCAB, width=8), tied=False)
    model = models.make(shape, dtype="bfloat16", remat="block")
    params, prompts = toys.random_params(model), toys.prompts()
    hidden, _ = jax.jit(model.apply)(params, prompts.tokens, prompts.mask)
    logits = model.logits(params, hidden)
    assert logits.dtype == hidden.dtype == jnp.float32
    np.testing.assert_allclose(logits, hidden @ model.head(params).T, atol=0.1)


def test_unsupported_options_are_refused():
    shape = shapes.network("gru", vocab_size=toys.VOCAB)
    for options, words in (({"lora": 2}, "--lora 0"), ({"scan": True}, "without --scan-layers")):
        with pytest.raises(UserError, match=words):
            models.make(shape, **options)
    with pytest.raises(UserError, match="reads no context"):
        models.make(shape).apply({}, None, None, context={})
    import dataclasses

    with pytest.raises(
        UserError,
        match="--model-kind 'rnn': choose one of transformer, gru, lstm, convolution, window",
    ):
        models.make(dataclasses.replace(shape, kind="rnn"))
