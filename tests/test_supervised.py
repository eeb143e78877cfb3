from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxppo import models, packing, parallel, policy, ppo, supervised
from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.models import lora, text_classifier
from jaxppo.models.text_classifier import Classifier
from jaxppo.rewards import classifier
from jaxppo.types import Model, Prompts

SETTINGS = Config(
    batch_size=8,
    prompt_length=2,
    response_length=4,
    epochs=1,
    minibatches=1,
    steps=50,
    lora=0,
    lr=1e-2,
    lr_schedule="constant",
    max_grad_norm=1e3,
)
ROWS = np.array(
    [[0, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8], [0, 0, 0, 9, 2, 3], [2, 2, 3, 3, 4, 4]] * 2, np.int32
)


def rows(**extra) -> Prompts:
    """Padding is token 0, on the left."""
    weight = (ROWS > 0).astype(np.float32)
    weight[1, :3] = 0  # a prompt of three tokens, not learned
    return Prompts(
        jnp.asarray(ROWS),
        jnp.asarray(ROWS > 0),
        jnp.arange(8, dtype=jnp.int32),
        {"weight": jnp.asarray(weight), **extra},
    )


def table() -> Model:
    """A model whose hidden state and value are one number for each token."""
    init = lambda key: {"table": jnp.zeros(12)}
    apply = lambda params, tokens, attend, **_: (params["table"][tokens][..., None], None)
    value = lambda params, hidden: hidden[..., 0]
    nothing = lambda *_: None
    return Model(init, nothing, apply, nothing, value, nothing, jnp.float32)


def fresh(params, reference=None, settings=SETTINGS, base=None):
    frozen = {"base": base or {}, "reference": reference, "reward": {}}
    return ppo.init_state(settings, toys.copied(params), frozen, jax.random.key(0))


@cache
def language(model):
    return supervised.language_model(model, SETTINGS)


@cache
def compiled(model, objective, settings=SETTINGS):
    return parallel.compile_step(supervised.make_train_step(model, objective, settings))


def once(model, objective, params, prompts, settings=SETTINGS, **frozen):
    step = compiled(model, objective, settings)
    return step(fresh(params, settings=settings, **frozen), prompts)


@pytest.mark.ci
def test_the_average_of_the_weights_follows(llama):
    settings = replace(SETTINGS, ema_decay=0.75)
    state, _ = once(llama.model, language(llama.model), llama.params, rows(), settings)
    want = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, llama.params, state.params)
    toys.assert_close(state.statistics["average"], want, atol=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize("last", [1, 9])
def test_only_the_last_tokens_have_logits(llama, last):
    """If only the last tokens have weight, loss and step do not depend on logits for the others."""
    weight = (ROWS > 0) & (np.arange(6) >= 6 - last)
    prompts = rows(weight=jnp.asarray(weight, jnp.float32))
    whole = language(llama.model)
    cut = supervised.language_model(llama.model, SETTINGS, last=last)
    assert (
        cut.weights(prompts).shape == (8, min(last, 5))
        and cut.weights(prompts).sum() == whole.weights(prompts).sum()
    )
    (one, want), (other, found) = (
        once(llama.model, objective, llama.params, prompts) for objective in (whole, cut)
    )
    toys.assert_close(one.params, other.params, atol=1e-6)
    assert float(want["loss"]) == pytest.approx(float(found["loss"]), abs=1e-6)


def test_the_loss_of_a_language_model_by_hand(llama):
    """Mean of −log softmax(previous logits)[token] over tokens with weight 1 and a predecessor."""
    _, metrics = once(llama.model, language(llama.model), llama.params, rows())
    hidden, _ = llama.model.apply(llama.params, jnp.asarray(ROWS), jnp.asarray(ROWS > 0))
    logp = np.asarray(jax.nn.log_softmax(llama.model.logits(llama.params, hidden)))
    total, count, right = 0.0, 0, 0
    for i, row in enumerate(ROWS):
        # the last slot that is not learned: a row's first token; row 1: its prompt
        first = {0: 1, 1: 2, 2: 3, 3: 0}[i % 4]
        if i == 5:
            first = 0  # the same tokens as row 1, all of them learned
        for t in range(first + 1, 6):
            total, count = total - logp[i, t - 1, row[t]], count + 1
            right += logp[i, t - 1].argmax() == row[t]
    assert float(metrics["loss"]) == pytest.approx(total / count, rel=1e-5)
    assert float(metrics["token_accuracy"]) == pytest.approx(right / count) and 0 < right < count
    assert float(metrics["length"]) == (5 + 6 + 3 + 6) / 4


def test_the_first_token_has_no_weight(llama):
    """The slot before it is padding, which attends to the whole row."""
    for objective in (language(llama.model), supervised.dpo(llama.model, SETTINGS)):
        # the first tokens of rows 0 and 2
        alone = rows(weight=jnp.zeros((8, 6)).at[0, 1].set(1.0).at[2, 3].set(1.0))
        costs, others = objective.costs(llama.params, llama.params, alone, None)
        weights = objective.weights(alone)
        # dpo of no token
        assert float((weights * costs).sum()) == pytest.approx(
            0 if objective.unit == 1 else 4 * np.log(2)
        )
        assert objective.unit == 2 or float(weights.sum()) == 0.0


def test_tokens_without_weight_have_no_gradient(llama):
    """The token without weight may change; removing a row's weight changes the loss."""
    objective = language(llama.model)
    whole = rows()
    loss = lambda prompts: float(once(llama.model, objective, llama.params, prompts)[1]["loss"])
    silent = whole.replace(extra={"weight": whole.extra["weight"].at[0].set(0.0)})
    # nothing comes after it, and it has no weight
    moved = silent.replace(tokens=silent.tokens.at[0, 5].set(10))
    assert loss(silent) == loss(moved) != loss(whole)


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["pmap", "microbatches", "adapters"])
def test_microbatches_give_the_same_update(llama, kind):
    objective = language(llama.model)
    want, metrics = once(llama.model, objective, llama.params, rows())
    if kind == "pmap":
        make = lambda axis_name: supervised.make_train_step(
            llama.model, objective, SETTINGS, axis_name=axis_name
        )
        step = parallel.compile_for_mode(make, mode="pmap")
        state, got = step(step.place(fresh(llama.params)), step.put(jax.device_get(rows())))
        state = step.unreplicate(state)
    elif kind == "microbatches":
        state, got = once(
            llama.model, objective, llama.params, rows(), replace(SETTINGS, microbatches=4)
        )
    else:
        model = models.make(toys.LLAMA, lora=2)
        trained, base = lora.split(toys.random_params(model), lora.is_trained)
        objective = supervised.language_model(model, SETTINGS)
        state, got = once(model, objective, trained, rows(), base=base)
        assert set(state.params["layers_0"]["attention"]) == {"q", "v"}  # the adapters alone
        assert (
            float(got["loss"]) > 0
            and (state.params["layers_0"]["attention"]["q"]["lora_b"] != 0).any()
        )
        return
    toys.assert_close(state.params, want.params, atol=2e-5)
    for name in metrics:
        np.testing.assert_allclose(got[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_packed_rows_give_the_update_of_padded_ones(llama, monkeypatch):
    """Rows of 5, 6, 3 and 6 tokens with weights: a token alone and an empty row, too. Packed two a
    part, loss, metrics and parameters are those of whole rows.
    """
    monkeypatch.setattr(packing, "LEAST_TOKENS", 12)
    some = rows()
    mask = some.mask.at[6, :5].set(False).at[7].set(False)
    some = some.replace(mask=mask, extra={"weight": some.extra["weight"] * mask})
    objective = language(llama.model)
    got, metrics = once(llama.model, objective, llama.params, some)
    dense = replace(SETTINGS, layout="dense")
    want, wanted = once(llama.model, objective, llama.params, some, dense)
    toys.assert_close(got.params, want.params, atol=1e-5)
    toys.assert_close(metrics, wanted, atol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize("adapters", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_packed_pairs_give_the_update_of_padded_ones(llama, monkeypatch, adapters):
    """DPO: the rows of a pair stand in different parts. One row has no weight."""
    monkeypatch.setattr(packing, "LEAST_TOKENS", 12)
    some = rows()
    some = some.replace(extra={"weight": some.extra["weight"].at[5].set(0.0)})
    model = models.make(toys.LLAMA, lora=adapters)
    trained, base = toys.random_params(model), {}
    reference = jax.tree.map(lambda x: 0.9 * x, trained)
    if adapters:
        trained, base = lora.split(trained, lora.is_trained)
        reference = None
    objective = supervised.dpo(model, SETTINGS, beta=0.5)

    def update(layout):
        config = replace(SETTINGS, layout=layout)
        return once(model, objective, trained, some, config, base=base, reference=reference)

    (got, metrics), (want, wanted) = update("packed"), update("dense")
    assert float(wanted["grad_norm"]) > 1e-3 and float(wanted["gap"]) != 0
    toys.assert_close(got.params, want.params, atol=1e-5)
    toys.assert_close(metrics, wanted, atol=1e-5)


def test_rows_move_to_the_left():
    """Row 2 has three tokens: they come first, their weights with them."""
    moved = supervised.left_aligned(rows())
    assert moved.tokens[2].tolist() == [9, 2, 3, 0, 0, 0]
    assert moved.mask[2].tolist() == [True] * 3 + [False] * 3
    assert moved.extra["weight"][1].tolist() == [0, 0, 0, 1, 1, 1]  # full: as it was


def test_a_language_model_learns_its_text(llama):
    step = compiled(llama.model, language(llama.model))
    state, losses = fresh(llama.params), []
    for _ in range(50):
        state, metrics = step(state, rows())
        losses.append(float(metrics["loss"]))
    # each token follows from those before it, but for the first ones
    assert losses[-1] < 0.5 < 1.5 < losses[0]
    assert step.traces == 1 and int(state.step) == 50 and int(state.cursor) == 400


def test_bradley_terry_by_hand():
    """Scores are the numbers of the last tokens, in rows 0 to 3: 6, 8, 3 and 4."""
    params = {
        "table": jnp.zeros(12).at[jnp.array([6, 8, 3, 4])].set(jnp.array([1.0, 0.5, -1.0, 2.0]))
    }
    objective = supervised.bradley_terry(table(), margin=0.5, centring=0.1)
    _, metrics = once(table(), objective, params, rows())
    # gaps 1 − .5 = .5 and −1 − 2 = −3; log σ(.5 − .5) = −.6931, log σ(−3 − .5) = −3.5298; sums 1.5
    # and 1
    want = ((0.69315 + 0.1 * 2.25) + (3.52975 + 0.1 * 1.0)) / 2
    assert float(metrics["loss"]) == pytest.approx(want, abs=1e-4)
    assert float(metrics["accuracy"]) == 0.5 and float(metrics["gap"]) == pytest.approx(-1.25)


def test_binary_cross_entropy_by_hand():
    params = {"table": jnp.zeros(12).at[6].set(2.0).at[8].set(-1.0)}
    prompts = rows(label=jnp.array([1.0, 1.0, 0.5, 0.5] * 2))
    _, metrics = once(table(), supervised.binary_cross_entropy(table()), params, prompts)
    # log(1 + e⁻²) = .1269, log(1 + e¹) = 1.3133, and log 2 for a score of 0
    assert float(metrics["loss"]) == pytest.approx((0.12693 + 1.31326 + 2 * 0.69315) / 4, abs=1e-4)
    assert float(metrics["accuracy"]) == 0.75  # 0 > 0 is false, and so is .5 > .5


@pytest.mark.ci
@pytest.mark.parametrize(
    ("classes", "label"), [(1, [0.8, 0.5, 0.2, 1.0] * 2), (3, [0, 1, 2, 1] * 2)]
)
def test_cross_entropy_uses_the_classifier(classes, label):
    """Texts are moved to the left, with padding on the right; the loss is Optax's cross-entropy."""
    net = Classifier(
        features=8, layers=("convolution", "pool", "gru"), dropout=0.0, classes=classes
    )
    params = classifier.as_model(net, vocab_size=12, width=4).init(jax.random.key(0))
    prompts = rows(label=jnp.asarray(label, jnp.float32))
    costs, others = supervised.cross_entropy(net).costs(params, None, prompts, None)
    lengths = (ROWS > 0).sum(1)
    # the padding behind the text
    ahead = np.stack([np.roll(row, length) for row, length in zip(ROWS, lengths)])
    logits = text_classifier.logits(
        net, params, jnp.asarray(ahead), jnp.arange(6)[None] < lengths[:, None]
    )
    if classes == 1:
        want, right = (
            optax.sigmoid_binary_cross_entropy(logits, jnp.asarray(label)),
            (logits > 0) == (np.asarray(label) > 0.5),
        )
    else:
        want = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(label))
        right = logits.argmax(1) == np.asarray(label)
    np.testing.assert_allclose(costs, want, atol=1e-6)
    np.testing.assert_array_equal(others["accuracy"], right)


@pytest.mark.ci
@pytest.mark.learning
def test_three_classes_with_a_trained_embedding():
    """The class is the order of the first two tokens; the embedding is trained, too."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, 512)
    texts = np.concatenate(
        [np.array([[4, 5], [5, 4], [4, 4]])[kinds], rng.integers(6, 8, (512, 4))], 1
    ).astype(np.int32)
    net = Classifier(features=8, layers=("convolution", "pool", "gru"), dropout=0.0, classes=3)
    model = classifier.as_model(net, vocab_size=12, width=4)
    objective = supervised.cross_entropy(net)
    step = parallel.compile_step(supervised.make_train_step(model, objective, SETTINGS))
    part = lambda at, n: Prompts(
        jnp.asarray(texts[at : at + n]),
        jnp.ones((n, 6), bool),
        jnp.arange(n),
        {"label": jnp.asarray(kinds[at : at + n])},
    )
    state = fresh(model.init(jax.random.key(0)))
    before = jax.device_get(state.params["embedding"])
    losses = []
    for number in range(288):  # six passes over 384 texts
        state, metrics = step(state, part(number % 48 * 8, 8))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[:8]) > 0.5 > 0.1 > np.mean(losses[-48:])
    sums, weight = supervised.make_evaluation(model, objective)(
        state.params, state.frozen, part(384, 128)
    )
    assert float(sums["accuracy"]) / float(weight) > 0.95
    assert (state.params["embedding"] != before).any(1)[4:8].all()


@pytest.mark.ci
def test_dpo_starts_at_the_reference(llama):
    """Policy and reference are equal: −log σ(0) = .6931 for each pair, within rounding (XLA may
    compile the two passes differently). Then the better rows gain.
    """
    objective = supervised.dpo(llama.model, SETTINGS, beta=1.0)
    step = parallel.compile_step(supervised.make_train_step(llama.model, objective, SETTINGS))
    state, metrics = step(fresh(llama.params, toys.copied(llama.params)), rows())
    assert (
        float(metrics["loss"]) == pytest.approx(0.69315, abs=1e-5)
        and abs(float(metrics["gap"])) < 1e-5
    )
    for _ in range(10):
        state, metrics = step(state, rows())
    assert float(metrics["accuracy"]) == 1 and float(metrics["gap"]) > 0.5


@pytest.mark.learning
def test_bradley_terry_finds_known_scores():
    """Ten texts with scores −1.5 to 1.5; 4096 pairs, each won with the probability σ(difference).
    Scores are known up to a constant; the standard error of one is about √(1 / (.2 · 820)) =
    .08.
    """
    rng = np.random.default_rng(0)
    truth = np.linspace(-1.5, 1.5, 10)
    pairs = np.stack([rng.permutation(10)[:2] for _ in range(4096)])
    won = rng.random(4096) < 1 / (1 + np.exp(truth[pairs[:, 1]] - truth[pairs[:, 0]]))
    ordered = np.where(won[:, None], pairs, pairs[:, ::-1]).reshape(-1, 1).astype(np.int32)
    settings = replace(SETTINGS, batch_size=8192, lr=5e-2)
    prompts = Prompts(
        jnp.asarray(ordered), jnp.ones((8192, 1), bool), jnp.arange(8192, dtype=jnp.int32)
    )
    step = parallel.compile_step(
        supervised.make_train_step(table(), supervised.bradley_terry(table()), settings)
    )
    state = fresh({"table": jnp.zeros(12)}, settings=settings)
    for _ in range(300):
        state, metrics = step(state, prompts)
    found = np.asarray(state.params["table"])[:10]
    np.testing.assert_allclose(found - found.mean(), truth, atol=0.3)
    assert float(metrics["accuracy"]) == pytest.approx(0.72, abs=0.05)


@pytest.mark.ci
def test_evaluation_adds_up_over_batches(llama):
    objective = language(llama.model)
    evaluate = supervised.make_evaluation(llama.model, objective)
    frozen = {"base": {}, "reference": None}
    sums, weight = evaluate(llama.params, frozen, rows())
    halves = [jax.tree.map(lambda x: x[part], rows()) for part in (slice(0, 4), slice(4, 8))]
    parts = [evaluate(llama.params, frozen, half) for half in halves]
    # 34 tokens, of which four are a row's first
    assert float(parts[0][1] + parts[1][1]) == float(weight) == 30
    assert float(parts[0][0]["loss"] + parts[1][0]["loss"]) == pytest.approx(
        float(sums["loss"]), rel=1e-5
    )
    assert float(sums["loss"] / weight) == pytest.approx(
        float(once(llama.model, objective, llama.params, rows())[1]["loss"]), rel=1e-5
    )


def test_a_non_finite_batch_changes_nothing():
    params = {"table": jnp.zeros(12).at[6].set(jnp.nan)}
    state, metrics = once(table(), supervised.bradley_terry(table()), params, rows())
    np.testing.assert_array_equal(state.params["table"], params["table"])
    assert (
        float(metrics["skipped"]) == 1
        and int(state.counters["barren_steps"]) == 1
        and int(state.step) == 1
    )


def test_a_batch_without_weight_changes_nothing(llama):
    step = compiled(llama.model, language(llama.model))
    state, _ = step(fresh(llama.params), rows())
    before = jax.device_get(state.params)
    state, metrics = step(state, rows().replace(extra={"weight": jnp.zeros((8, 6))}))
    toys.assert_same(state.params, before)
    assert float(metrics["skipped"]) == float(metrics["barren_steps"]) == 1
    assert float(step(state, rows())[1]["barren_steps"]) == 0  # none in a row any more


def on_two_devices(objective, state, prompts):
    """(states, metrics) of a step on two devices."""
    step = supervised.make_train_step(table(), objective, SETTINGS, axis_name="devices")
    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), prompts)
    return jax.vmap(lambda part: step(state, part), axis_name="devices")(halves)


@pytest.mark.ci
def test_the_noise_differs_between_steps_and_devices():
    """The key is folded with the step and the device's first row, 0 or 4."""

    def costs(params, reference, prompts, key):
        return 0 * params["table"][prompts.tokens[:, 5]], {"drawn": jnp.full(4, draw(key))}

    draw, fold = jax.random.uniform, jax.random.fold_in
    objective = supervised.Objective(lambda prompts: jnp.ones(4), costs)
    state = fresh({"table": jnp.ones(12)})
    for number in range(2):
        _, metrics = on_two_devices(objective, state.replace(step=jnp.int32(number)), rows())
        key = fold(state.key, number)
        want = float(draw(fold(key, 0)) + draw(fold(key, 4))) / 2
        np.testing.assert_allclose(metrics["drawn"], [want, want], rtol=1e-6)


@pytest.mark.ci
def test_a_device_whose_rows_have_no_weight_makes_the_step_of_the_others():
    objective = supervised.Objective(
        lambda prompts: prompts.extra["weight"][:, 5],
        lambda params, reference, prompts, key: (params["table"][prompts.tokens[:, 5]], {}),
    )
    prompts = rows().replace(extra={"weight": jnp.ones((8, 6)).at[4:].set(0.0)})
    two, metrics = on_two_devices(objective, fresh({"table": jnp.ones(12)}), prompts)
    assert metrics["skipped"].tolist() == [0.0, 0.0]
    # tokens 6, 8, 3 and 4 move by the rate
    moved = [0.99 if token in (3, 4, 6, 8) else 1.0 for token in range(12)]
    np.testing.assert_allclose(two.params["table"], [moved] * 2, rtol=1e-4)


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="--epochs 1 --minibatches 1"):
        supervised.make_train_step(
            table(), supervised.binary_cross_entropy(table()), replace(SETTINGS, minibatches=2)
        )
    with pytest.raises(UserError, match="--microbatches 3 does not divide the 4 rows or pairs"):
        once(
            table(),
            supervised.bradley_terry(table()),
            {"table": jnp.zeros(12)},
            rows(),
            replace(SETTINGS, microbatches=3),
        )


def test_log_probs_ignore_the_sampling_settings(llama):
    """Temperature and nucleus have no effect."""
    other = replace(SETTINGS, temperature=0.5, top_k=2)
    one, two = (
        supervised.language_model(llama.model, s).costs(llama.params, None, rows(), None)[0]
        for s in (SETTINGS, other)
    )
    np.testing.assert_array_equal(one, two)
    rolled, plain = supervised.as_response(rows(), other)
    np.testing.assert_array_equal(
        one, -policy.response_logprobs(llama.model, llama.params, rolled, config=plain).raw_logprobs
    )


@pytest.mark.ci
@pytest.mark.parametrize(
    "objective",
    [
        supervised.bradley_terry,
        pytest.param(
            lambda model: supervised.dpo(model, SETTINGS), marks=pytest.mark.slow, id="dpo"
        ),
    ],
)
def test_a_pair_is_not_cut_between_devices(llama, objective):
    """Eight devices with one row each have no pairs. Four devices give the update of one."""
    made = objective(llama.model)
    make = lambda axis_name: supervised.make_train_step(
        llama.model, made, SETTINGS, axis_name=axis_name
    )
    params = {**llama.params, "value": {"kernel": jnp.ones((16, 1)) / 4, "bias": jnp.zeros(())}}
    run = lambda step, prompts: step.unreplicate(
        step(step.place(fresh(params, toys.copied(params))), step.put(prompts))[0]
    )
    host = jax.tree.map(np.asarray, rows())
    with pytest.raises(UserError, match="each device has 1 rows, but they come in pairs"):
        run(parallel.compile_for_mode(make, mode="pmap"), host)
    one = run(parallel.compile_for_mode(make, mode="jit"), host)
    four = run(parallel.compile_for_mode(make, mode="pmap", devices=jax.devices()[:4]), host)
    # Adam's first step, 1e-2, is as large where a gradient is tiny
    toys.assert_close(one.params, four.params, atol=1e-5)
