from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from toys import SETTINGS

from jaxppo import parallel, ppo
from jaxppo.models import lora
from jaxppo.rewards import shaping
from jaxppo.rewards.host import on_host
from jaxppo.rewards.shaping import token_rewards

PROMPTS = toys.prompts()


class Spied:
    """A step whose reward is a Python function that may be exchanged, and that shows the rollout
    and the rewards within.
    """

    def __init__(self, toy, settings):
        self.judge = lambda prompt, response: response.count("d")
        self.rollout = self.rewards = None
        decode = lambda rows: ["".join(chr(ord("a") + token) for token in row) for row in rows]
        reward = on_host(lambda prompt, response: self.judge(prompt, response), decode)

        def watched(scores, rollout, *, kl_coef, kl):
            out = token_rewards(scores, rollout, kl_coef=kl_coef, kl=kl)
            jax.debug.callback(self.see, rollout, out)
            return out

        self.toy, self.settings = toy, settings
        self.compiled = toys.step(toy, settings, reward=reward, token_rewards=watched)

    def see(self, rollout, rewards):
        self.rollout, self.rewards = jax.device_get((rollout, rewards))

    def __call__(self, state, prompts=PROMPTS):
        out = jax.block_until_ready(self.compiled(state, prompts))
        jax.effects_barrier()
        return out

    def state(self, **changes):
        return toys.state(self.toy, self.settings).replace(**changes)


@pytest.fixture(scope="module")
def spied(llama, toy_step):
    return Spied(llama, toy_step.settings)


@pytest.fixture
def judge(spied):
    """Put another judge in for one test."""
    usual = spied.judge
    yield lambda fn: setattr(spied, "judge", fn)
    spied.judge = usual


def other_reference(toy):
    return {"base": {}, "reference": toys.random_params(toy.model, seed=5), "reward": {}}


# One step


def test_one_step(toy_step):
    state, metrics = toy_step(toy_step.state(), PROMPTS)
    assert all(
        x.shape == () and x.dtype == jnp.float32 and np.isfinite(x) for x in metrics.values()
    )
    assert int(state.step) == 1
    assert int(state.cursor) == 8
    assert {name: int(x) for name, x in state.counters.items()} == {
        "skipped_updates": 0,
        "invalid_rows": 0,
        "barren_steps": 0,
    }
    assert float(metrics["first_ratio_off"]) < 1e-4
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-5)  # the reference is the policy itself
    assert float(metrics["advantage_std"]) == pytest.approx(1, abs=1e-4)
    moved = [
        float(jnp.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (state.params, toy_step.toy.params)), strict=True)
    ]
    assert min(moved) > 0  # every weight is trained
    assert max(moved) <= 4.1e-3  # by four steps of Adam at 1e-3


@pytest.mark.ci
def test_the_metrics_are_those_of_the_rollout(spied):
    state, metrics = spied(spied.state(frozen=other_reference(spied.toy)))
    seen = spied.rollout
    assert float(metrics["length"]) == pytest.approx(seen.mask.sum() / 8)
    assert float(metrics["finished"]) == pytest.approx(seen.finished.mean())
    assert float(metrics["reward"]) == pytest.approx(
        (((seen.response == 3) * seen.mask).sum(1)).mean()
    )
    # nats a response: a sum over tokens, a mean over rows
    kl = ((seen.raw_logprobs - seen.ref_logprobs) * seen.mask).sum(1).mean()
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-5)
    assert kl > 1


@pytest.mark.ci
def test_rewards_of_tokens(spied):
    """The score less the penalty of .5 for a missing end on the last acting token, and minus
    kl_coef · k1 on every one.
    """
    spied(spied.state(frozen=other_reference(spied.toy)))
    seen = spied.rollout
    want = -0.1 * (seen.raw_logprobs - seen.ref_logprobs) * seen.mask
    for row in range(8):
        sampled = int(seen.mask[row].sum())
        hits = int((seen.response[row, :sampled] == 3).sum())
        want[row, sampled - 1] += hits - 0.5 * (not seen.finished[row])
    np.testing.assert_allclose(spied.rewards, want, atol=1e-5)
    assert 0 < seen.finished.sum() < 8


@pytest.mark.ci
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (
            toys.gpt2,
            {"top_k": 6, "top_p": 0.9, "temperature": 0.8, "value_loss": "none", "group_size": 2},
        ),
        (lambda: toys.llama("bfloat16"), {"top_p": 0.9}),
    ],
    ids=["gpt2 in a keep-set without critic", "bfloat16"],
)
def test_sampler_and_scorer_agree_on_the_first_minibatch(make, changes):
    toy, settings = make(), replace(SETTINGS, **changes)
    prompts = toys.grouped(settings.group_size)
    state, metrics = toys.step(toy, settings)(toys.state(toy, settings), prompts)
    assert float(metrics["first_ratio_off"]) < (1e-4 if toy.model.dtype == jnp.float32 else 5e-2)
    assert all(np.isfinite(x) for x in metrics.values())
    assert int(state.counters["skipped_updates"]) == 0
    assert int(state.cursor) == 8 // settings.group_size  # prompts, not rows


# Randomness


def test_the_same_step_twice_is_the_same(toy_step):
    runs = []
    for _ in range(2):
        state = toy_step.state()
        for seed in range(3):
            state, metrics = toy_step(state, toys.prompts(seed=seed))
        runs.append((state, metrics))
    toys.assert_same(*runs)


@pytest.mark.ci
def test_two_steps_with_the_same_prompts_and_weights_sample_differently(spied):
    responses = []
    for step, seed in ((0, 0), (1, 0), (0, 1)):
        spied(spied.state(step=jnp.asarray(step, jnp.int32), key=jax.random.key(seed)))
        responses.append(spied.rollout.response)
    for one in range(3):
        for other in range(one):
            assert (responses[one] != responses[other]).any(1).sum() >= 6  # nearly every row


@pytest.mark.ci
def test_rows_of_the_same_prompt_sample_differently(spied):
    same = jax.tree.map(lambda x: x[:1].repeat(8, 0), PROMPTS).replace(
        index=jnp.arange(8, dtype=jnp.int32)
    )
    spied(spied.state(), same)
    assert len({tuple(row) for row in spied.rollout.response.tolist()}) > 4


@pytest.mark.ci
def test_no_key_is_used_twice(llama, toy_step):
    with jax.debug_key_reuse(True):
        with pytest.raises(jax.errors.KeyReuseError):  # the check itself works
            jax.jit(lambda key: jax.random.uniform(key) + jax.random.normal(key))(jax.random.key(0))
        step = toys.step(llama, toy_step.settings)
        state = toy_step.state()
        for _ in range(2):
            state, metrics = step(state, PROMPTS)
    assert np.isfinite(metrics["loss"])


@pytest.mark.ci
def test_the_update_has_another_key_than_the_samples(llama):
    """The check above does not see it, since both are only folded and split: noise of row 0 would
    be that of epoch 0.
    """

    def make_update(model, parts, config, *, axis_name=None):
        none = dict.fromkeys(("skipped", "stopped", "empty", "last_approx_kl"), jnp.zeros(()))
        return lambda state, batch, key: (state, none | {"key": jax.random.key_data(key)})

    _, metrics = toys.step(llama, update=make_update)(toys.state(llama), PROMPTS)
    samples, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
    assert metrics["key"].tolist() != jax.random.key_data(samples).tolist()


# Rewards that fail


@pytest.mark.ci
def test_a_reward_on_the_host_equals_the_same_in_the_graph(spied, toy_step):
    (one, one_metrics), (other, other_metrics) = (
        spied(spied.state()),
        toy_step(toy_step.state(), PROMPTS),
    )
    assert float(one_metrics["reward"]) > 0
    toys.assert_close(one, other, atol=1e-6)
    toys.assert_close(one_metrics, other_metrics, atol=1e-5)


def raises(prompt, response):
    raise RuntimeError("no idea")


def fails_for_some(fail):
    """Scored like the others, unless the response holds an f."""
    return lambda prompt, response: (
        fail(prompt, response) if "f" in response else response.count("d")
    )


@pytest.mark.ci
@pytest.mark.parametrize(
    "fail", [raises, lambda p, r: None, lambda p, r: "a", lambda p, r: np.nan, lambda p, r: -np.inf]
)
def test_invalid_rows_are_counted_and_leave_the_loss(spied, judge, fail):
    judge(fails_for_some(raises))
    want, metrics = spied(spied.state())
    bad = ((spied.rollout.response == 5) * spied.rollout.mask).sum(1) > 0
    assert 0 < bad.sum() < 8
    assert float(metrics["invalid_rows"]) == bad.sum() == int(want.counters["invalid_rows"])
    assert float(metrics["nonfinite_rows"]) == 0  # it is the reward
    hits = ((spied.rollout.response == 3) * spied.rollout.mask).sum(1)
    assert float(metrics["reward"]) == pytest.approx(hits[~bad].mean())
    judge(fails_for_some(fail))
    toys.assert_same(spied(spied.state()), (want, metrics))  # how it failed does not matter


@pytest.mark.ci
def test_counters_add_up(spied, judge):
    judge(raises)
    state, _ = spied(spied.state())
    state, metrics = spied(state)
    assert int(state.counters["invalid_rows"]) == 16
    assert all(np.isfinite(x) for x in metrics.values())


@pytest.mark.ci
def test_a_step_without_a_valid_row_changes_no_parameter(spied, judge):
    judge(raises)
    state, metrics = spied(spied.state())
    toys.assert_same(state.params, spied.toy.params)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
    assert float(state.controller["kl_coef"]) == float(
        spied.state().controller["kl_coef"]
    )  # nothing was measured
    assert int(state.step) == 1


def test_a_step_that_is_not_finite_changes_no_parameter(toy_step):
    """A reference that says NaN: KL, rewards and advantages are NaN."""
    broken = jax.tree.map(lambda x: x * jnp.nan, toy_step.toy.params)
    state, metrics = toy_step(
        toy_step.state().replace(frozen={"base": {}, "reference": broken, "reward": {}}), PROMPTS
    )
    before = toy_step.state()
    for name in ("params", "opt_state", "controller", "statistics"):
        toys.assert_same(getattr(state, name), getattr(before, name))
    assert float(metrics["skipped"]) == 4  # 2 epochs of 2
    assert int(state.counters["skipped_updates"]) == 4
    assert (int(state.step), int(state.cursor)) == (1, 8)
    good, metrics = toy_step(state.replace(frozen=before.frozen), PROMPTS)
    assert float(metrics["skipped"]) == 0 and int(good.counters["skipped_updates"]) == 4
    assert all(np.isfinite(x) for x in metrics.values())


def scored(rolled, settings=SETTINGS, generate=None, **changes):
    """What is kept of a rollout, on one device."""
    parts, start = toys.parts(settings, **changes), shaping.init_statistics()
    return ppo.score_rollout(parts, settings, {}, rolled, generate, start, None)[0]


def test_rows_whose_numbers_are_not_finite_are_invalid(llama):
    """Rows 1, 3 and 6, whose tokens have a reward like any others."""
    rolled = toys.roll(llama, PROMPTS)
    found = scored(
        rolled.replace(
            values=rolled.values.at[1, 0].set(jnp.nan),
            logprobs=rolled.logprobs.at[3, 0].set(-jnp.inf),
            raw_logprobs=rolled.raw_logprobs.at[6, 4].set(jnp.nan),
        )
    )
    assert np.flatnonzero(~found.valid).tolist() == [1, 3, 6]
    assert float(found.metrics["invalid_rows"]) == float(found.metrics["nonfinite_rows"]) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.rollout))


def test_the_greedy_response_has_the_weights_and_the_faults_of_a_reward(llama):
    """Columns 1 and n of rows 8 + n, weights 3 and .5; 10 is not valid, 13 is not finite."""
    settings = replace(SETTINGS, advantage="remax", value_loss="none")
    rolled = toys.roll(llama, PROMPTS)

    def reward(params, rolled):
        n = jnp.where(rolled.index == 13, jnp.nan, rolled.index.astype(jnp.float32))
        return jnp.stack([jnp.ones(8), n], 1), rolled.index != 10

    found = scored(
        rolled,
        settings,
        lambda **_: rolled.replace(index=rolled.index + 8),
        reward=reward,
        score_weights=(("one", 3.0), ("number", 0.5)),
    )
    assert np.flatnonzero(~found.valid).tolist() == [2, 5]
    # 3 + .5 · 8 = 7, and .5 more a row; invalid rows have 0
    want = [7.0, 7.5, 0.0, 8.5, 9.0, 0.0, 10.0, 10.5]
    assert found.rollout.extra["greedy_scores"].tolist() == want


def test_the_samples_are_the_first_of_each_prompt(llama):
    """Rows 0 and 2 of groups of 2, with the scores that the reward gave."""
    settings = replace(SETTINGS, log_samples=2, group_size=2)
    rolled = toys.roll(llama, PROMPTS)
    reward = lambda params, rolled: (jnp.arange(8.0), jnp.ones(8, bool))
    samples = scored(rolled, settings, reward=reward).metrics["samples"]
    assert samples[:, -1].tolist() == [0.0, 2.0]
    attended = jnp.where(rolled.attend, rolled.tokens, -1)
    np.testing.assert_array_equal(samples[:, :-1], attended[jnp.array([0, 2])])


def test_groups_are_informative_by_their_scores_not_their_penalties(llama):
    """All score 1, but the rows of group 1 do not both end."""
    settings = replace(SETTINGS, group_size=2, filter_groups=True, missing_eos_penalty=0.5)
    ended = jnp.array([True, True, True, False, True, True, True, True])
    rolled = toys.roll(llama, PROMPTS).replace(finished=ended)
    reward = lambda params, rolled: (jnp.ones(8), jnp.ones(8, bool))
    found = scored(rolled, settings, reward=reward)
    assert found.scores.tolist() == [1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert found.valid.all() and not found.learn.any()


@pytest.mark.ci
def test_metrics_of_scores_are_of_all_devices(llama):
    """Two devices with four rows each; of 1, 2 and 5, which are invalid, one has two."""
    settings = replace(SETTINGS, num_tasks=2, group_size=2)
    rolled = toys.roll(llama, PROMPTS).replace(extra={"task": jnp.arange(8) // 3 % 2})
    reward = lambda params, rolled: (rolled.index**2 * 1.0, (rolled.index * 3 + 1) % 5 > 1)
    parts, start = toys.parts(settings, reward=reward), shaping.init_statistics()
    split = lambda part: ppo.score_rollout(parts, settings, {}, part, None, start, "devices")[0]
    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), rolled)
    found = jax.vmap(lambda part: split(part).metrics, axis_name="devices")(halves)
    want = scored(rolled, settings, reward=reward).metrics
    assert float(want["invalid_rows"]) == 3
    for d in range(2):
        own = {name: x[d] for name, x in found.items() if name != "samples"}
        toys.assert_close(own, {name: want[name] for name in own}, rtol=1e-5)


# KL control: target 1 nat, horizon 100, floor .05


def controlled(toy_step, coef, frozen=None):
    state = toy_step.state()
    state = state.replace(
        controller={**state.controller, "kl_coef": jnp.float32(coef)}, frozen=frozen or state.frozen
    )
    new, metrics = toy_step(state, PROMPTS)
    assert float(metrics["kl_coef"]) == pytest.approx(coef)  # the one that was used
    return float(new.controller["kl_coef"]), float(metrics["kl"])


def test_the_coefficient_rises_above_the_target(toy_step):
    coef, kl = controlled(toy_step, 0.1, other_reference(toy_step.toy))
    assert kl > 1.2  # so the error is clipped at .2
    assert coef == pytest.approx(0.1 * (1 + 0.2 * 8 / 100))  # 8 rollouts


def test_the_coefficient_falls_below_the_target(toy_step):
    coef, kl = controlled(toy_step, 0.1)
    assert kl < 0.8
    assert coef == pytest.approx(0.1 * (1 - 0.2 * 8 / 100))


def test_the_coefficient_has_a_floor(toy_step):
    assert controlled(toy_step, 0.0501)[0] == pytest.approx(0.05)


# The state, and several steps at once


def test_no_two_leaves_share_a_buffer(toy_step):
    """Else the second of them is donated twice."""
    state = toy_step.state().replace(frozen=None)
    places = [
        x.unsafe_buffer_pointer()
        for x in jax.tree.leaves(state)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    assert len(set(places)) == len(places)


@pytest.mark.ci
def test_several_steps_in_one_dispatch(llama, toy_step):
    batches = [toys.prompts(seed=k) for k in range(3)]
    state, rows = toy_step.state(), []
    for batch in batches:
        state, metrics = toy_step(state, batch)
        rows.append(metrics)
    step = parallel.compile_step(
        ppo.repeat(
            ppo.make_train_step(llama.model, toys.parts(toy_step.settings), toy_step.settings)
        )
    )
    together, metrics = step(toy_step.state(), jax.tree.map(lambda *x: jnp.stack(x), *batches))
    toys.assert_close(together, state, atol=1e-6)
    assert step.traces == 1
    for k in range(3):
        toys.assert_close(
            {name: x[k] for name, x in metrics.items()}, rows[k], atol=1e-5, rtol=1e-4
        )


@pytest.mark.ci
def test_with_adapters_the_base_stays(llama):
    """The program is traced, not compiled: shapes tell what is trained and what comes back."""
    toy = toys.make(toys.LLAMA, lora=2)
    trained, base = lora.split(toy.params, lora.is_trained)
    frozen = {"base": base, "reference": None, "reward": {}}
    settings = replace(SETTINGS, lora=2)
    state = ppo.init_state(settings, trained, frozen, jax.random.key(0))
    step = ppo.make_train_step(toy.model, toys.parts(settings), settings)
    new, _ = jax.eval_shape(step, state, PROMPTS)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(new) == shapes(
        state
    )  # nothing changes shape or type, so the next step runs the same program
    moments = sum(x.size for x in jax.tree.leaves(new.opt_state))
    assert (
        moments == 2 * lora.count(trained) + 2
    )  # Adam's two of each number that is trained, and two counts


@pytest.mark.ci
def test_a_step_may_be_vmapped_over_seeds(llama):
    step = ppo.make_train_step(llama.model, toys.parts(), SETTINGS)
    states = [toys.state(llama, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    new, metrics = jax.eval_shape(jax.vmap(step, in_axes=(0, None)), stacked, PROMPTS)
    assert metrics["loss"].shape == (2,)
    assert jax.tree.structure(new) == jax.tree.structure(stacked)


def test_prompts_of_another_length_are_refused(toy_step, llama):
    step = ppo.make_train_step(llama.model, toys.parts(), SETTINGS)
    with pytest.raises(ValueError, match=r"prompts.tokens must be i\[8, 4\]"):
        jax.eval_shape(step, toy_step.state(), toys.ragged([3] * 8, 6))
