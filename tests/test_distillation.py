from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys

from jaxppo import (
    advantages,
    algorithms,
    distillation,
    kl,
    models,
    packing,
    parallel,
    policy,
    ppo,
    update,
)
from jaxppo.losses import token
from jaxppo.models import missing
from jaxppo.presets import preset
from jaxppo.rewards import in_program

SETTINGS = replace(
    preset(toys.SETTINGS, "distil"),
    distil_coef=0.7,
    temperature=0.8,
    optimizer="sgd",
    lr_schedule="constant",
    lr=0.1,
    max_grad_norm=0.0,
)
# another family and width, and an embedding with two rows more
TEACHER = replace(toys.GPT2, width=24, vocab_size=toys.VOCAB + 2)
DIVERGENCES = {"reverse": kl.full, "forward": kl.forward, "jsd": kl.jensen_shannon}


@pytest.fixture(scope="module")
def llama():
    return toys.llama()


@pytest.fixture(scope="module")
def teacher():
    own = toys.make(TEACHER)
    return own._replace(model=missing.without(own.model, np.array([toys.VOCAB, toys.VOCAB + 1])))


def logits_of(toy, rolled, temperature=SETTINGS.temperature):
    """The plain way: all logits of dense rows, after the temperature."""
    states = policy.states_before_tokens(toy.model, toy.params, rolled)
    return toy.model.logits(toy.params, states)[..., : toys.VOCAB] / temperature


@pytest.mark.ci
@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_as_a_reward_it_has_the_gradient_of_the_divergence(gamma, x64):
    """All 15 sequences of the oracle. With gamma 1, KL(π‖π_T) of whole sequences; with gamma 0,
    that in each state, how often states are met held fixed.
    """
    table, goal = oracle.logprobs(oracle.LOGITS), oracle.logprobs(oracle.REF)
    tokens, states, mask = (jnp.asarray(x) for x in oracle.world())
    mask = mask.astype(table.dtype)
    read = lambda table: table[states, tokens] * mask
    gains = read(goal) - read(table)
    to_go = advantages.returns_to_go(gains, mask, gamma=gamma)
    prob = jnp.exp(read(table).sum(1))

    def loss(table):
        per_token, _ = token.reinforce(read(table), read(goal), to_go, mask)
        return (prob[:, None] * per_token).sum()

    def whole(table):
        own = read(table).sum(1)
        return (jnp.exp(own) * (own - read(goal).sum(1))).sum()

    fixed = lambda table: (oracle.visits(table) * kl.full(table, goal)).sum()
    # through the softmax: a table of log-probs is no free parameter
    gradient = lambda f: jax.grad(lambda z: f(oracle.logprobs(z)))(jnp.asarray(oracle.LOGITS))
    found, want = gradient(loss), gradient(whole if gamma else fixed)
    np.testing.assert_allclose(found, want, atol=1e-12)
    assert np.abs(found - gradient(fixed if gamma else whole)).max() > 1e-3


@pytest.mark.ci
@pytest.mark.parametrize("name", DIVERGENCES)
def test_as_a_loss_it_has_the_gradient_of_the_divergence_in_each_state(llama, teacher, name):
    """The gradient of the loss with the teacher minus that without it."""
    rolled = toys.roll(llama, toys.prompts(), SETTINGS)
    rolled, _ = distillation.ask(
        teacher.model, teacher.params, rolled, config=SETTINGS, with_states=True
    )
    zeros = jnp.zeros_like(rolled.mask)
    batch = update.Batch(rolled, rolled.mask, rolled.logprobs, zeros, zeros)
    settings = replace(SETTINGS, distil=name, logits_bytes=1000)  # 1000 / 4 / 11 = 22 rows: chunks
    parts = toys.parts(settings, teacher=teacher.model)
    constants = update.LossConstants({}, teacher=teacher.params)
    weights = parts.aggregate(batch.mask)
    loss = update.make_loss(llama.model, parts, settings)
    program = jax.jit(lambda p: jax.grad(loss, has_aux=True)(p, constants, weights, batch, None))
    found, (sums, _) = program(llama.params)
    goal = logits_of(teacher, rolled)

    def plain(params):
        value = DIVERGENCES[name](logits_of(llama._replace(params=params), rolled), goal)
        return (value * rolled.mask).sum() / rolled.mask.sum()

    value, want = jax.jit(jax.value_and_grad(plain))(llama.params)
    toys.assert_close(found, jax.tree.map(lambda x: 0.7 * x, want), atol=2e-6, rtol=1e-4)
    assert float(sums["teacher_loss"] / rolled.mask.sum()) == pytest.approx(float(value), rel=1e-5)
    assert float(value) > 0.05


@pytest.mark.ci
def test_what_the_teacher_says(llama, teacher):
    """log π_T(a) − log π(a) at the run's temperature, also packed; a hint changes what it reads."""
    rolled = toys.roll(llama, toys.prompts(), SETTINGS)
    pick = lambda logits: jnp.take_along_axis(
        jax.nn.log_softmax(logits), rolled.response[..., None], 2
    )[..., 0]
    want = (pick(logits_of(teacher, rolled)) - pick(logits_of(llama, rolled))) * rolled.mask
    for layout in ("dense", "packed"):
        settings = replace(SETTINGS, layout=layout, tokens_per_microbatch=20)
        ask = lambda rolled, settings=settings: distillation.ask(
            teacher.model, teacher.params, rolled, config=settings, with_states=False
        )
        own, gains = jax.jit(ask)(rolled)
        np.testing.assert_allclose(gains, want, atol=2e-5)
        assert own.extra.keys() == rolled.extra.keys()
        _, other = jax.jit(ask)(with_hints(rolled, hint=5))
        assert np.abs(other - gains).max() > 0.01


def with_hints(prompts, hint: int | None):
    """Prompts or a rollout with two slots more in front of what the teacher reads, which hold a
    hint of one token, or nothing.
    """
    tokens, mask = (x[:, :4] for x in (prompts.tokens, getattr(prompts, "attend", prompts.mask)))
    wider = [jnp.pad(x, ((0, 0), (2, 0))) for x in (tokens, mask)]
    if hint is not None:  # in the slot before the prompt
        first = jnp.argmax(wider[1], 1)[:, None] - 1 == jnp.arange(6)[None]
        wider = [jnp.where(first, hint, wider[0]), wider[1] | first]
    return prompts.replace(extra={**prompts.extra, "hint_tokens": wider[0], "hint_mask": wider[1]})


def train(llama, settings, prompts, *, teacher=None, steps=1, seed=0):
    """(parameters, metrics) after some steps from the start, with no reward but the teacher's."""
    parts = algorithms.make_parts(settings, in_program.no_reward)._replace(
        teacher=llama.model if teacher is None else teacher.model
    )
    step = parallel.compile_step(ppo.make_train_step(llama.model, parts, settings))
    state = toys.state(llama, settings, seed=seed)
    if teacher is not None:
        state = state.replace(frozen={**state.frozen, "teacher": teacher.params})
    for _ in range(steps):
        state, metrics = step(state, prompts)
    return state.params, metrics


@pytest.mark.ci
@pytest.mark.parametrize("distil", ["reward", "jsd"])
def test_who_teaches_himself_without_a_hint_has_nothing_to_learn(llama, distil):
    settings = replace(SETTINGS, distil=distil)
    params, metrics = train(llama, settings, with_hints(toys.prompts(), None))
    assert abs(metrics["teacher_kl"]) < 1e-5
    assert distil == "reward" or abs(metrics["teacher_loss"]) < 1e-5
    toys.assert_close(params, llama.params, atol=1e-5)


@pytest.mark.ci
def test_who_teaches_himself_with_a_reference_of_every_step_agrees_with_himself(llama):
    """The teacher is the policy at the beginning of the step: a reward moves the policy, and what
    the teacher says of the next samples is what the policy says.
    """
    settings = replace(SETTINGS, reference_every=1, lr=1.0)
    step, state = toys.step(llama, settings, teacher=llama.model), toys.state(llama, settings)
    start = toys.copied(state.params)
    for _ in range(3):
        before = toys.copied(state.params)
        state, metrics = step(state, toys.prompts())
        assert abs(metrics["teacher_kl"]) < 1e-5
    toys.assert_same(state.statistics["reference"], before)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, start)
    assert max(jax.tree.leaves(moved)) > 0.05


@pytest.mark.ci
def test_with_a_hint_there_is_something_to_learn(llama):
    params, metrics = train(llama, SETTINGS, with_hints(toys.prompts(), 5))
    assert metrics["teacher_kl"] > 0.01
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, llama.params)
    assert max(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.ci
@pytest.mark.parametrize("distil", ["jsd", "reward"])
def test_packed_is_dense(llama, teacher, distil):
    """Groups with a hint, so that prompts of teacher and policy differ in length; two epochs."""
    prompts = with_hints(toys.grouped(4), 5)
    settings = replace(SETTINGS, distil=distil, group_size=4, epochs=2, tokens_per_microbatch=20)
    assert packing.is_packed(llama.model, settings)
    packed, metrics = train(llama, settings, prompts, teacher=teacher)
    dense, expected = train(llama, replace(settings, layout="dense"), prompts, teacher=teacher)
    toys.assert_close(packed, dense, atol=1e-5)
    for name in ("teacher_kl", "loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-4), name


@pytest.mark.ci
def test_under_pmap_and_over_a_mesh_the_same(llama, teacher):
    settings = replace(SETTINGS, distil="reverse")
    one, metrics = train(llama, settings, toys.prompts(), teacher=teacher)
    parts = algorithms.make_parts(settings, in_program.no_reward)._replace(teacher=teacher.model)
    for options in (
        {"mode": "pmap", "devices": jax.devices()[:2]},
        {"mesh": "data=2,fsdp=2,tensor=2"},
    ):
        step = parallel.compile_for_mode(
            lambda axis: ppo.make_train_step(llama.model, parts, settings, axis_name=axis),
            **options,
        )
        state = toys.state(llama, settings)
        state = state.replace(frozen={**state.frozen, "teacher": teacher.params})
        state, found = step(step.place(state), step.put(jax.device_get(toys.prompts())))
        toys.assert_close(step.unreplicate(state).params, one, atol=2e-5)
        assert float(found["teacher_kl"]) == pytest.approx(float(metrics["teacher_kl"]), rel=1e-4)


@pytest.mark.parametrize(
    ("distil", "seed"),
    [
        pytest.param(x, seed, marks=pytest.mark.slow if seed or x != "reward" else pytest.mark.ci)
        for x in ("reward", "reverse", "forward", "jsd")
        for seed in range(3)
    ],
)
def test_the_policy_becomes_like_its_teacher(llama, teacher, distil, seed):
    settings = replace(SETTINGS, distil=distil, optimizer="adam", lr=2e-2, batch_size=32)
    settings = replace(settings, distil_coef=1.0 if distil != "jsd" else 4.0)
    prompts = toys.prompts(32)
    _, before = train(llama, settings, prompts, teacher=teacher, seed=seed)
    _, after = train(llama, settings, prompts, teacher=teacher, steps=30, seed=seed)
    assert after["teacher_kl"] < 0.5 * before["teacher_kl"]


@pytest.mark.ci
def test_a_divergence_of_the_wrong_shape_is_refused(llama, teacher):
    parts = toys.parts(SETTINGS, teacher=teacher.model, divergence=lambda p, q: p - q)
    step = ppo.make_train_step(llama.model, parts, SETTINGS)
    state = toys.state(llama, SETTINGS)
    state = state.replace(frozen={**state.frozen, "teacher": teacher.params})
    with pytest.raises(Exception, match="the part divergence must return numbers"):
        jax.eval_shape(step, state, toys.prompts())


@pytest.mark.ci
def test_a_network_that_does_not_pack_may_teach(llama):
    """A recurrent one."""
    shape = models.shapes.network("gru", vocab_size=toys.VOCAB)
    gru = toys.make(shape)
    _, metrics = train(llama, replace(SETTINGS, distil="forward"), toys.prompts(), teacher=gru)
    assert np.isfinite(metrics["teacher_kl"]) and metrics["teacher_loss"] > 0
