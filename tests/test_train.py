import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import algorithms, ppo, pretrained, tracking, train
from jaxppo.config import RunConfig, UserError

RUN = RunConfig(
    tiny=True,
    batch_size=4,
    prompt_length=4,
    response_length=3,
    minibatches=2,
    steps=4,
    save_every=2,
    eval_every=3,
    lora=2,
    lr=1e-2,
    parallel="jit",
)
TEXTS = ["one", "two", "four", "x", "seven", "it", "ab"]


def reward(params, rollout):
    """The share of ids above 128."""
    score = ((rollout.response > 128) * rollout.mask).sum(1) / rollout.mask.sum(1)
    return score, score > -1


CLOCK = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def loaded():
    return train.load_policy(RUN)


@pytest.fixture(scope="module")
def prompts(loaded):
    return train.encode(TEXTS, loaded[1].tokenizer, 4, too_long="last")


def fit(folder, prompts, config=RUN, evaluate=None):
    """A run from the start, or from its checkpoint, with parameters of its own: the step destroys what it is given."""
    config, policy = train.load_policy(config)
    folder = tracking.run_folder(folder.parent, folder.name, resume=config.resume)
    return train.fit(config, policy, algorithms.make_parts(config, reward), prompts, folder=folder, evaluate=evaluate)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, prompts):
    """A run of 4 steps without a break, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return fit(folder, prompts, evaluate=lambda state: {"score": 1.0 / int(state.step), "x": 5.0}), folder


def lines(folder):
    return [{k: x for k, x in row.items() if k not in CLOCK} for row in tracking.read_lines(folder / "metrics.jsonl")]


# A run


def test_a_run_leaves_its_files(straight):
    state, folder = straight
    assert int(state.step) == 4
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.json", "curves.png", "metrics.jsonl"]
    stored = json.loads((folder / "config.json").read_text())
    assert (stored["steps"], stored["lora"], stored["eos"]) == (4, 2, 256)
    rows = tracking.read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["length"] * 4 / row["seconds"])
        assert row["first_ratio_off"] < 1e-4
    assert [row.get("validation_x") for row in rows] == [None, None, 5.0, 5.0]  # every 3 steps, and at the end


def test_a_resumed_run_equals_one_without_a_break(straight, tmp_path, prompts):
    """Stopped by the user after step 3, whose checkpoint is that of step 2."""

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken", prompts, evaluate=stop)
    assert [row["step"] for row in lines(tmp_path / "broken")][:2] == [1, 2]
    state = fit(tmp_path / "broken", prompts, replace(RUN, resume=True), lambda state: {"score": 1.0 / int(state.step), "x": 5.0})
    toys.assert_same(state, straight[0])
    assert lines(tmp_path / "broken") == lines(straight[1])


def test_several_steps_in_a_dispatch_are_the_same_run(straight, tmp_path, prompts):
    config = replace(RUN, steps_per_call=2, eval_every=0)
    state = fit(tmp_path / "pairs", prompts, config)
    toys.assert_close(state, straight[0], atol=1e-5)
    rows = lines(tmp_path / "pairs")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, want in zip(rows, lines(straight[1]), strict=True):
        assert row["reward"] == want["reward"] and row["length"] == want["length"]  # the same samples


def test_a_second_run_of_the_same_name_is_refused(straight, prompts):
    with pytest.raises(UserError, match="exists: choose another --name"):
        fit(straight[1], prompts)


def test_resume_without_a_run_is_refused(tmp_path, prompts):
    with pytest.raises(UserError, match="nothing to resume"):
        fit(tmp_path / "none", prompts, replace(RUN, resume=True))


def test_resume_of_a_run_that_never_saved(tmp_path, prompts):
    tracking.write_config(tracking.run_folder(tmp_path, "early", resume=False), {})
    with pytest.raises(UserError, match="no checkpoint in"):
        fit(tmp_path / "early", prompts, replace(RUN, resume=True))


def test_resume_with_other_adapters_is_refused(straight, prompts):
    with pytest.raises(UserError, match="does not fit this configuration"):
        fit(straight[1], prompts, replace(RUN, resume=True, lora=3))


def test_a_configuration_that_cannot_run_is_refused_before_anything_is_written(tmp_path, prompts, loaded):
    with pytest.raises(UserError, match="--batch-size 5"):
        parts = algorithms.make_parts(RUN, reward)
        train.fit(replace(RUN, batch_size=5), loaded[1], parts, prompts, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_restore_a_run_from_its_folder(straight):
    state, folder = straight
    config, policy, restored = train.restore(folder)
    assert config.response_length == 3 and config.lora == 2
    toys.assert_same(restored.replace(frozen=None), state.replace(frozen=None))
    toys.assert_same(policy.frozen["base"], state.frozen["base"])


# The policy


def test_with_adapters_the_base_is_the_reference(loaded):
    config, policy = loaded
    assert (config.eos, config.pad) == (256, 256)
    assert policy.frozen["reference"] is None
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(policy.params)}
    assert names and all("lora" in name or "value" in name for name in names)
    assert not any("lora" in str(path) or "value" in str(path[0]) for path, _ in train._leaves(policy.frozen["base"]))


def test_without_adapters_everything_is_trained_and_the_reference_is_a_copy():
    _, policy = train.load_policy(replace(RUN, lora=0))
    reference = policy.frozen["reference"]
    trained = {path: leaf for path, leaf in train._leaves(policy.params)}
    for path, leaf in train._leaves(reference):
        np.testing.assert_array_equal(trained[path], leaf)
        assert trained[path].unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()  # one is donated, the other stays
    assert set(trained) - {path for path, _ in train._leaves(reference)} == {("value", "kernel"), ("value", "bias")}


def test_more_tokens_than_the_model_takes():
    with pytest.raises(UserError, match=r"200 \+ --response-length 100 = 300 tokens, but the model takes 256"):
        train.load_policy(replace(RUN, prompt_length=200, response_length=100))


def test_an_unknown_model():
    with pytest.raises(UserError) as caught:
        train.load_policy(replace(RUN, tiny=False, model="./no/such/folder"))
    assert isinstance(caught.value, pretrained.PretrainedError)
    assert "no/such/folder" in str(caught.value)


# Prompts


def test_batches_are_a_function_of_seed_and_cursor(prompts):
    one, same, next_one = (prompts.batch(RUN, cursor) for cursor in (0, 0, 4))
    toys.assert_same(one, same)
    assert (one.tokens != next_one.tokens).any()
    assert (prompts.batch(replace(RUN, seed=1), 0).tokens != one.tokens).any()
    assert one.index.tolist() == [0, 1, 2, 3]
    together = np.concatenate([prompts.batch(RUN, cursor).tokens for cursor in range(0, 28, 4)])
    found = np.unique(together, axis=0, return_counts=True)
    assert found[1].tolist() == [4] * 7  # 28 rows are 4 epochs of 7 prompts


def test_copies_of_a_prompt_are_neighbours(prompts):
    batch = prompts.batch(replace(RUN, batch_size=8, group_size=4), 0)
    assert batch.tokens.shape == (8, 4)
    for group in (batch.tokens[:4], batch.tokens[4:]):
        assert (group == group[0]).all()
    single = prompts.batch(replace(RUN, batch_size=2), 0)
    np.testing.assert_array_equal(batch.tokens[::4], single.tokens)
    assert batch.index.tolist() == list(range(8))  # each copy has noise of its own


def test_several_batches_of_one_call(prompts):
    config = replace(RUN, steps_per_call=3, batch_size=4, group_size=2)
    stacked = prompts.call(config, 2)
    assert isinstance(stacked.tokens, np.ndarray)  # the step puts them where it wants them
    for k in range(3):
        want = prompts.batch(config, 2 + 2 * k)  # two prompts a step
        toys.assert_same(jax.tree.map(lambda x: x[k], stacked), jax.tree.map(jnp.asarray, want))


# Sampling from a policy


@pytest.fixture(scope="module")
def sampler(loaded):
    config, policy = loaded
    return train.Sampler(config, policy, rows=4)


def test_sampler_takes_any_number_of_prompts(sampler, straight, prompts):
    state, _ = straight
    seven = sampler(state, prompts, seed=0)
    assert [sample.prompt for sample in seven] == ["one", "two", "four", "x", "even", "it", "ab"]
    assert all(1 <= len(sample.tokens) <= 3 for sample in seven)
    five = sampler(state, train.PromptSet(*(x[:5] for x in prompts)), seed=0)
    assert five == seven[:5]  # what fills up the last part changes nothing
    assert sampler(state, prompts, seed=0) == seven
    assert sampler(state, prompts, seed=1) != seven


def test_kl_of_samples_is_to_the_base(sampler, straight, prompts, loaded):
    state, _ = straight
    assert any(abs(sample.kl) > 1e-4 for sample in sampler(state, prompts, seed=0))
    fresh = state.replace(params=loaded[1].params)  # adapters as they were made: nothing added
    assert all(abs(sample.kl) < 1e-4 for sample in sampler(fresh, prompts, seed=0))


# The stopwatch


def test_stopwatch_shares_the_time_among_the_steps_of_a_dispatch(monkeypatch):
    now = iter([10.0, 16.0, 16.0])
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(now)))
    clock = train.Stopwatch(replace(RUN, steps_per_call=3))
    clock.watch(7, {"length": jnp.array([1.0, 2.0, 3.0])})
    rows = clock.settle()
    assert [row["step"] for row in rows] == [7, 8, 9]
    assert [row["seconds"] for row in rows] == [2.0] * 3  # 6 seconds of 3 steps
    assert [row["tokens_per_second"] for row in rows] == [2.0, 4.0, 6.0]  # 4 rows of 1, 2, 3 tokens in 2 seconds
    assert clock.settle() == []


def test_scores_of_the_untrained_policy_get_mean_0_and_deviation_1(tmp_path, prompts):
    """Over 12 rollouts; the statistics are part of the state, and so of its checkpoints."""
    config = replace(RUN, steps=2, reward_reference=12)
    _, policy = train.load_policy(config)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    scores = train.first_scores(config, policy, algorithms.make_parts(config, reward), prompts, state)
    assert scores.shape == (12,)
    done = fit(tmp_path / "reference", prompts, config)
    gain, bias = (float(done.statistics[name]) for name in ("gain", "bias"))
    shaped = gain * np.asarray(scores) + bias
    assert shaped.mean() == pytest.approx(0, abs=1e-5) and shaped.std() == pytest.approx(1, rel=1e-4)
    resumed = fit(tmp_path / "reference", prompts, replace(config, steps=4, resume=True))
    assert float(resumed.statistics["gain"]) == gain


def test_a_separate_critic_shares_the_base_under_adapters():
    _, policy = train.load_policy(replace(RUN, critic="separate", value_init="normal"))
    base = policy.frozen["base"]
    place = lambda x: x["embed"]["embedding"].unsafe_buffer_pointer()
    assert place(base["critic"]) == place(base)  # one copy in memory
    assert (policy.params["critic"]["value"]["kernel"] != 0).any()
    assert "value" not in policy.params  # nobody asks the actor


def test_a_run_on_eight_devices_is_that_of_one(tmp_path, prompts):
    """Tokens, metrics, parameters; checkpoints are those of one device, so a run may go on elsewhere."""
    config = replace(RUN, batch_size=32, lr=1e-4, steps=4)
    one = fit(tmp_path / "one", prompts, config)
    rows = lambda name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    first = fit(tmp_path / "eight", prompts, replace(config, steps=2, lr_schedule="constant", parallel="pmap"))
    assert int(first.step) == 2
    for name, mode in (("pmap", {"parallel": "pmap"}), ("mesh", {"parallel": "mesh", "mesh": "data=4,fsdp=2"})):
        eight = fit(tmp_path / name, prompts, replace(config, expect_devices=8, **mode))
        toys.assert_close(eight.params, one.params, atol=2e-5)
        for a, b in zip(rows(name), rows("one"), strict=True):
            assert {k: x for k, x in a.items() if k not in CLOCK} == pytest.approx(
                {k: x for k, x in b.items() if k not in CLOCK}, rel=2e-3, abs=2e-5
            )


def test_eight_devices_stop_and_one_goes_on(tmp_path, prompts):
    config = replace(RUN, batch_size=32, lr=1e-4)
    straight = fit(tmp_path / "straight", prompts, config)
    whole = tmp_path / "moved"

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # at step 3; step 2 is saved
        fit(whole, prompts, replace(config, parallel="pmap"), evaluate=stop)
    resumed = fit(whole, prompts, replace(config, resume=True))
    toys.assert_close(resumed.params, straight.params, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": "pmap"}, ["--batch-size 4", "8 devices"]),
        ({"parallel": "mesh", "mesh": "data=4"}, ["data 4", "there are 8"]),
        ({"expect_devices": 4}, ["--expect-devices 4", "there are 8"]),
    ],
)
def test_devices_that_do_not_fit_are_refused(loaded, changes, words):
    config = replace(loaded[0], **changes)
    if changes.get("mesh"):
        config = replace(config, batch_size=32)
    with pytest.raises(UserError) as caught:
        train.compiled(config, loaded[1], algorithms.make_parts(config, reward))
    for word in words:
        assert word in str(caught.value)


def test_a_value_head_from_a_reward_model():
    config = replace(RUN, value_init="reward")
    with pytest.raises(UserError, match="--value-init reward needs a reward model"):
        train.load_policy(config)
    _, plain = train.load_policy(RUN)
    model = {"value": jax.tree.map(lambda x: x + 3.0, plain.params["value"])}
    _, policy = train.load_policy(config, reward=model)
    toys.assert_same(policy.params["value"], model["value"])
