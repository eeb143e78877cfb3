import gc
import json
import math
import re
import shutil
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import toys
from runs import RUN, SMALL, TEXTS, TIMING_KEYS, rows_without_times

from jaxppo import algorithms, ppo, supervised, train
from jaxppo.costs import memory
from jaxppo.data import rows
from jaxppo.data.prompts import encode
from jaxppo.environments import guess, strings
from jaxppo.environments.text import Answer, from_rows
from jaxppo.errors import RunError, UserError
from jaxppo.pretrained.tokenizer import END
from jaxppo.rewards import in_program
from jaxppo.run import episodes, files, load, manifest, sampler, start
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.lock import RunLock


def reward(params, rollout):
    """The share of ids above 128."""
    score = ((rollout.response > 128) * rollout.mask).sum(1) / rollout.mask.sum(1)
    return score, score > -1


def fit(folder, prompts, config=RUN, evaluate=None):
    """A run from the start, or from its checkpoint, with parameters of its own: the step destroys
    what it is given.
    """
    config, policy = load.load_policy(config)
    folder = files.run_folder(folder.parent, folder.name, resume=config.resume)
    return train.fit(
        config,
        policy,
        algorithms.make_parts(config, reward),
        prompts,
        folder=folder,
        evaluate=evaluate,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory, prompts):
    """A run of 4 steps without a break, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return fit(
        folder, prompts, evaluate=lambda state: {"score": 1.0 / int(state.step), "x": 5.0}
    ), folder


# A run


@pytest.mark.ci
def test_a_run_leaves_its_files(straight):
    state, folder = straight
    assert int(state.step) == 4
    typed = (
        getattr(sys.modules["__main__"], "__file__", None) is not None
    )  # the suite may run in processes that nobody typed
    assert (folder / "command.txt").exists() == typed
    assert sorted(path.name for path in folder.iterdir() if path.name != "command.txt") == [
        "checkpoints",
        "config.json",
        "curves.png",
        "lock.json",
        "metrics.jsonl",
        "samples.jsonl",
    ]
    stored = json.loads((folder / "config.json").read_text())
    assert (stored["steps"], stored["lora"], stored["eos"]) == (4, 2, 256)
    rows = files.read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["length"] * 4 / row["seconds"])
        assert row["first_ratio_off"] < 1e-4
    assert [row.get("validation_x") for row in rows] == [
        None,
        None,
        5.0,
        5.0,
    ]  # every 3 steps, and at the end


@pytest.mark.ci
def test_a_resumed_run_equals_one_without_a_break(straight, tmp_path, prompts):
    """Stopped by the user after step 3, whose checkpoint is that of step 2."""

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken", prompts, evaluate=stop)
    assert [row["step"] for row in rows_without_times(tmp_path / "broken")][:2] == [1, 2]
    state = fit(
        tmp_path / "broken",
        prompts,
        replace(RUN, resume=True),
        lambda state: {"score": 1.0 / int(state.step), "x": 5.0},
    )
    toys.assert_same(state, straight[0])
    assert rows_without_times(tmp_path / "broken") == rows_without_times(straight[1])


@pytest.mark.ci
def test_several_steps_in_a_dispatch_are_the_same_run(straight, tmp_path, prompts):
    config = replace(RUN, steps_per_call=2, eval_every=0)
    state = fit(tmp_path / "pairs", prompts, config)
    toys.assert_close(state, straight[0], atol=1e-5)
    rows = rows_without_times(tmp_path / "pairs")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, want in zip(rows, rows_without_times(straight[1]), strict=True):
        assert (
            row["reward"] == want["reward"] and row["length"] == want["length"]
        )  # the same samples


@pytest.mark.ci
def test_a_supervised_run_is_a_run_like_any_other(tmp_path, loaded):
    """A language model with adapters: metrics, checkpoints, early stopping, resume to the last bit,
    and its best weights.
    """
    config, policy = loaded
    texts = rows.pack(
        TEXTS * 4, policy.tokenizer.encode, config.length, eos=policy.tokenizer.eos_id
    )
    config = replace(RUN, minibatches=1, lr=1e-3, lr_schedule="constant")
    scores = {3: 0.5, 4: 0.25}

    def go(name, **changes):
        own, policy = load.load_policy(replace(config, **changes))
        folder = files.run_folder(tmp_path, name, resume=own.resume)
        objective = supervised.language_model(policy.model, own)
        return train.fit(
            own,
            policy,
            objective,
            texts,
            folder=folder,
            evaluate=lambda s: {"score": scores[int(s.step)]},
        )

    straight = go("straight")
    found = rows_without_times(tmp_path / "straight")
    assert [row["step"] for row in found] == [1, 2, 3, 4] and found[-1]["validation_score"] == 0.25
    assert found[-1]["loss"] < found[0]["loss"] and found[0]["length"] == 7
    go("broken", steps=2, eval_every=0)
    toys.assert_same(go("broken", resume=True).params, straight.params)
    assert (
        int(load.restore_best(tmp_path / "straight", straight).step) == 3
    )  # kept, though no save was due
    assert int(go("patient", patience=1).step) == 4
    assert int(load.restore_best(tmp_path / "patient", straight).step) == 3
    assert (
        int(go("patient", patience=1, resume=True, steps=9).step) == 4
    )  # it had ended, and remembers
    never = go("never", eval_every=0)
    assert (
        int(load.restore_best(tmp_path / "never", never).step) == 4
    )  # no score at all: the newest


@pytest.mark.ci
def test_the_numbers_go_to_a_tracker_too_and_change_nothing(straight, tmp_path, prompts):
    """Seen, step by step, where it writes: beside the record of the same run."""
    pytest.importorskip("tensorboardX")
    state = fit(tmp_path / "tracked", prompts, replace(RUN, track="tensorboard", steps=4))
    toys.assert_same(state, straight[0])
    (events,) = (tmp_path / "tracked" / "tensorboard").iterdir()
    assert events.read_bytes().count(b"first_ratio_off") == 4


@pytest.mark.ci
def test_only_the_first_process_has_trackers(tmp_path, prompts, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(train.processes, "is_main", lambda: False)
    (tmp_path / "shared").mkdir()  # by the first one
    assert int(fit(tmp_path / "shared", prompts, replace(RUN, track="tensorboard")).step) == 4
    assert list((tmp_path / "shared").iterdir()) == []


@pytest.mark.ci
def test_a_second_run_of_the_same_name_is_refused(straight, prompts):
    with pytest.raises(UserError, match="exists: choose another --name"):
        fit(straight[1], prompts)


@pytest.mark.ci
@pytest.mark.parametrize("killed", ["before its folder", "before its settings", "before a save"])
def test_resume_begins_what_has_not_begun(tmp_path, prompts, straight, capsys, killed):
    if killed != "before its folder":
        files.run_folder(tmp_path, "early", resume=False)
    if killed == "before a save":
        files.write_config(tmp_path / "early", {})
    capsys.readouterr()
    score = lambda state: {"score": 1.0 / int(state.step), "x": 5.0}
    fit(tmp_path / "early", prompts, replace(RUN, resume=True), score)
    said = capsys.readouterr().out
    again = "the run ended before anything was saved: it starts from the beginning"
    first = "resuming" if killed == "before a save" else "new run:"
    assert said.startswith(f"{first} {tmp_path / 'early'}\n")
    assert (again in said) == (killed == "before a save")
    assert rows_without_times(tmp_path / "early") == rows_without_times(straight[1])
    assert json.loads((tmp_path / "early" / "config.json").read_text())["steps"] == RUN.steps


@pytest.mark.ci
def test_resume_of_a_run_whose_checkpoints_are_gone(tmp_path, prompts, straight):
    """It has steps in its metrics, so something was lost: refused."""
    folder = files.run_folder(tmp_path, "lost", resume=False)
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).write_text((straight[1] / name).read_text())
    with pytest.raises(UserError, match="no checkpoint in"):
        fit(folder, prompts, replace(RUN, resume=True))


@pytest.mark.ci
def test_resume_with_settings_of_another_run_is_refused(straight, prompts, capsys):
    """What changes the numbers is refused by name; what does not is shown."""
    changed = replace(RUN, resume=True, lora=3, lr=0.5, save_every=4)
    with pytest.raises(
        UserError,
        match="would make it another run: --lora 2 -> 3, --lr 0.01 -> 0.5; start one under another",
    ):
        fit(straight[1], prompts, changed)
    fit(straight[1], prompts, replace(RUN, resume=True, save_every=4))
    assert "changed since the run began: --save-every 2 -> 4" in capsys.readouterr().out


@pytest.mark.ci
def test_resume_with_other_data_is_refused(straight, loaded, prompts):
    other = encode([*TEXTS[:-1], "xy"], loaded[1].tokenizer, 4, too_long="last")
    newest = straight[1] / "checkpoints" / "4"
    assert manifest.read(newest)["data"] == rows.identity(prompts) != rows.identity(other)
    with pytest.raises(UserError, match="the data are not those that this run began with"):
        fit(straight[1], other, replace(RUN, resume=True))
    fit(straight[1], other, replace(RUN, resume=True, data_changed="ok"))


@pytest.mark.ci
def test_an_evaluation_that_a_signal_left_out_is_made_up(straight, tmp_path, prompts):
    """Steps 3 and 4 are evaluated. A signal in step 4 saves it without: no numbers in its line, no
    score. Gone on with, nothing is left to train, and the run is the one that nobody disturbed.
    """
    evaluate = lambda state: {"score": 1.0 / int(state.step), "x": 5.0}
    folder = tmp_path / "stopped"
    fit(folder, prompts, evaluate=evaluate)
    place = folder / "checkpoints" / "4"
    record = {
        name: x for name, x in manifest.read(place).items() if name not in ("files", "sha256")
    }
    manifest.seal(place, record | {"score": None})
    rows = files.read_jsonl(folder / "metrics.jsonl")
    rows[-1] = {name: x for name, x in rows[-1].items() if not name.startswith("validation_")}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit(folder, prompts, replace(RUN, resume=True), evaluate)
    assert rows_without_times(folder) == rows_without_times(straight[1])
    scores = lambda folder: Checkpoints(folder / "checkpoints", write=False).scores
    assert scores(folder) == scores(straight[1]) and scores(folder)[4] == 0.25
    assert (
        int(fit(folder, prompts, replace(RUN, resume=True), lambda state: 1 / 0).step) == 4
    )  # once is enough


@pytest.mark.ci
def test_resume_at_the_last_step_does_nothing(straight, prompts):
    before = rows_without_times(straight[1])
    state = fit(straight[1], prompts, replace(RUN, resume=True), lambda state: 1 / 0)
    assert int(state.step) == 4 and rows_without_times(straight[1]) == before


def test_a_second_writer_is_refused(tmp_path, prompts, monkeypatch):
    folder = tmp_path / "shared"
    folder.mkdir()
    own = RunLock(folder)
    with pytest.raises(
        UserError, match="shared belongs to process .*; wait for it, or choose another --name"
    ):
        fit(folder, prompts)
    own.release()
    assert [path.name for path in folder.iterdir()] == ["lock.json"]  # nothing of the second one


@pytest.mark.ci
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(28, "No space left on device"),
            r"cannot write \(\[Errno 28\] No space left on device\); step 4 is safe",
        ),
        (MemoryError(), "out of memory .*--remat block .*; step 4 is safe, continue with --resume"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"),
            r"out of memory \(RESOURCE_EXHAUSTED: 9 GB\); lower it",
        ),
    ],
)
def test_no_room_is_one_line(straight, error, words):
    checkpoints = Checkpoints(straight[1] / "checkpoints", write=False)
    found = start.explain(error, RUN, checkpoints)
    assert isinstance(found, RunError) and found.code == 1 and re.search(words, str(found))
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert start.explain(other, RUN, checkpoints) is other


def test_a_configuration_that_cannot_run_is_refused_before_anything_is_written(
    tmp_path, prompts, loaded
):
    with pytest.raises(UserError, match="--batch-size 5"):
        parts = algorithms.make_parts(RUN, reward)
        train.fit(replace(RUN, batch_size=5), loaded[1], parts, prompts, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ci
def test_restore_a_run_from_its_folder(straight):
    state, folder = straight
    assert int(load.restore(folder)[2].step) == 3  # the best: its score is 1 / 3
    config, policy, restored = load.restore(folder, checkpoint="newest")
    assert config.response_length == 3 and config.lora == 2
    toys.assert_same(restored.replace(frozen=None), state.replace(frozen=None))
    toys.assert_same(policy.frozen["base"], state.frozen["base"])


@pytest.mark.ci
def test_scores_of_the_untrained_policy_get_mean_0_and_deviation_1(tmp_path, prompts):
    """Over 12 rollouts; the statistics are part of the state, and so of its checkpoints."""
    config = replace(RUN, steps=2, reward_reference=12)
    _, policy = load.load_policy(config)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    scores = start.reference_scores(
        config, policy, algorithms.make_parts(config, reward), prompts, state
    )
    assert scores.shape == (12,)
    two = lambda scores, valid: (jax.numpy.stack([scores, scores], 1), valid)
    wide = lambda params, rollout: two(*reward(params, rollout))
    named = algorithms.make_parts(config, wide)._replace(score_weights=(("a", 3.0), ("b", -1.0)))
    weighted = start.reference_scores(config, policy, named, prompts, state)
    np.testing.assert_allclose(weighted, 2 * np.asarray(scores), rtol=1e-6)  # 3 - 1
    done = fit(tmp_path / "reference", prompts, config)
    gain, bias = (float(done.statistics[name]) for name in ("gain", "bias"))
    shaped = gain * np.asarray(scores) + bias
    assert shaped.mean() == pytest.approx(0, abs=1e-5) and shaped.std() == pytest.approx(
        1, rel=1e-4
    )
    resumed = fit(tmp_path / "reference", prompts, replace(config, steps=4, resume=True))
    assert float(resumed.statistics["gain"]) == gain


@pytest.mark.slow  # test_modes.py has the steps, test_processes.py runs
def test_a_run_on_eight_devices_is_that_of_one(tmp_path, prompts):
    """Tokens, metrics, parameters; checkpoints are those of one device, so a run may go on
    elsewhere.
    """
    config = replace(RUN, batch_size=32, lr=1e-4, steps=4)
    one = fit(tmp_path / "one", prompts, config)
    rows = lambda name: [
        json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]
    for name, mode in (
        ("pmap", {"parallel": "pmap"}),
        ("mesh", {"parallel": "mesh", "mesh": "data=4,fsdp=2"}),
    ):
        eight = fit(tmp_path / name, prompts, replace(config, expect_devices=8, **mode))
        toys.assert_close(eight.params, one.params, atol=2e-5)
        for a, b in zip(rows(name), rows("one"), strict=True):
            assert {k: x for k, x in a.items() if k not in TIMING_KEYS} == pytest.approx(
                {k: x for k, x in b.items() if k not in TIMING_KEYS}, rel=2e-3, abs=2e-5
            )


@pytest.mark.ci
def test_over_a_mesh_no_device_holds_more_than_its_part(tmp_path, prompts):
    """Loaded, trained, evaluated, saved: the first device of eight has no more than the last, but
    for a few numbers.
    """

    def held(number):
        gc.collect()
        here = [
            x
            for x in jax.live_arrays()
            if number in {device.id for device in x.sharding.device_set}
        ]
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in here)

    before, last = held(0) - held(7), held(7)  # of other tests
    config, policy = load.load_policy(
        replace(RUN, batch_size=32, lora=0, parallel="mesh", mesh="fsdp=8")
    )
    whole, own = (
        sum(x.nbytes for x in jax.tree.leaves(policy.params)),
        memory.tree_bytes(policy.params),
    )
    draw, more = sampler.Sampler(config, policy, rows=8), [held(0) - held(7) - before]

    def evaluate(state):
        draw(state, prompts, seed=0)
        more.append(held(0) - held(7) - before)
        # parameters, two moments, the reference; and rows, small arrays
        assert held(7) - last < 6 * own < whole
        return {"score": 0.0}

    folder = files.run_folder(tmp_path, "mesh", resume=False)
    done = train.fit(
        config,
        policy,
        algorithms.make_parts(config, reward),
        prompts,
        folder=folder,
        evaluate=evaluate,
    )
    best = load.restore_best(folder, done)
    more.append(held(0) - held(7) - before)
    assert len(more) == 4 and max(more) < 0.05 * whole, (more, whole)
    assert best.key == done.key and best.key.sharding == done.key.sharding
    assert best.params["embed"]["embedding"].sharding == done.params["embed"]["embedding"].sharding


@pytest.mark.ci
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
        start.build_step(config, loaded[1], algorithms.make_parts(config, reward))
    for word in words:
        assert word in str(caught.value)


def test_a_setting_without_effect_is_told(loaded, capsys):
    config = replace(loaded[0], kl_adaptive=False, kl_target=3.0)
    start.build_step(config, loaded[1], algorithms.make_parts(config, reward))
    assert "\nnote: kl_target 3.0 has no effect with kl_adaptive False\n" in capsys.readouterr().out


# From Python


def right(prompt, response, answer):
    """A reward with two scores; the column is that of the prompt."""
    assert answer == 2 * int(prompt.split()[0])
    return {"right": float(str(answer) in response), "short": -len(response)}


PACKED = {**SMALL, "layout": "packed"}
SUMS = [{"prompt": f"{i} + {i} =", "answer": 2 * i} for i in range(8, 12)]


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """A run made from Python, and its folder of runs."""
    root = tmp_path_factory.mktemp("door")
    validation = SUMS[:2]
    run = train.policy(
        SUMS, right, weights={"short": 0.1}, validation=validation, runs=str(root), **PACKED
    )
    return run, root


@pytest.mark.ci
def test_a_run_from_python(door):
    run, root = door
    assert run.folder == root / "policy" and run.config.advantage == "group"
    assert run.config.prompt_length == len("10 + 10 =")  # bytes of the longest prompt
    metrics = run.metrics
    assert metrics["step"].tolist() == [1, 2] and (metrics["invalid_rows"] == 0).all()
    np.testing.assert_allclose(
        metrics["reward"], metrics["score_right"] + 0.1 * metrics["score_short"], rtol=1e-5
    )
    assert np.isnan(metrics["validation_reward"]).tolist() == [True, False]
    found = files.read_jsonl(root / "policy" / "samples.jsonl")
    assert len(found) == 2  # a response to each of the first step's two prompts
    assert {row["prompt"] for row in found} <= {row["prompt"] for row in SUMS}
    for row in found:
        assert row["reward"] == pytest.approx(row["right"] + 0.1 * row["short"])


@pytest.mark.ci
def test_a_run_is_resumed_and_another_gets_a_free_name(door, capsys):
    run, root = door
    more = train.policy(
        SUMS,
        right,
        weights={"short": 0.1},
        validation=SUMS[:2],
        runs=str(root),
        resume=True,
        **{**PACKED, "steps": 3},
    )
    assert more.metrics["step"].tolist() == [1, 2, 3]
    other = train.policy(
        ["a", "bc"],
        lambda params, rollout: (rollout.mask.sum(1), rollout.finished | True),
        runs=str(root),
        parts=lambda parts: parts._replace(policy_loss=zero_loss),
        log_samples=0,
        resume=False,
        **{**PACKED, "steps": 1},
    )
    assert other.folder.name == "policy-2" and other.metrics["policy_loss"].tolist() == [0.0]
    assert run.config.functions.startswith("reward right@")
    assert "policy_loss zero_loss@" in other.config.functions
    assert ": loss zero_loss@" in capsys.readouterr().out  # what runs, not the setting's loss
    assert "advantage" not in other.config.functions  # that of the settings
    with pytest.raises(UserError, match="^resume=True with other settings .* functions reward"):
        train.policy(SUMS, wrong, runs=str(root), resume=True, **{**PACKED, "steps": 4})
    again = {"runs": str(root), "resume": True, **PACKED, "steps": 4}
    with pytest.raises(UserError, match="functions reward .*, weight short 0.1 -> .* short 0.2"):
        train.policy(SUMS, right, weights={"short": 0.2}, validation=SUMS[:2], **again)
    longer = [{"prompt": "100 + 100 =", "answer": 200}, *SUMS[1:]]
    with pytest.raises(UserError, match="^the data are not those that this run began with"):
        train.policy(longer, right, weights={"short": 0.1}, validation=SUMS[:2], **again)
    assert not (other.folder / "samples.jsonl").exists()


def wrong(prompt, response):
    return 0.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt_format": "Q: {prompt}"}, "prompt_format: prompts are read as they are"),
        ({"reward_model": "runs/judge"}, "a reward function and reward_model runs/judge"),
        (
            {"reward": None, "teacher": "x", "weights": {"a": 2.0}},
            "weights are of the named scores",
        ),
    ],
)
def test_what_would_be_passed_over_is_refused(tmp_path, given, words):
    arguments = {"reward": wrong, "runs": str(tmp_path)} | given
    with pytest.raises(UserError) as error:
        train.policy(["a"], **arguments)
    assert words in str(error.value) and not any(tmp_path.iterdir())


@pytest.mark.ci
def test_samples_of_chats_show_their_format(tmp_path):
    """With its special tokens, here one that the user wrote; samples of texts have none."""
    found = {}
    for name, prompt in (("chat", [{"role": "user", "content": f"a{END}"}]), ("text", f"a{END}")):
        settings = {**SMALL, "prompt_length": 32, "steps": 1, "name": name}
        run = train.policy([prompt] * 4, wrong, runs=str(tmp_path), **settings)
        rows = files.read_jsonl(run.folder / "samples.jsonl")
        found[name] = run.config.chats, {row["prompt"] for row in rows}
    assert found["chat"] == (True, {f"user: a{END}\nassistant: "})
    assert found["text"] == (False, {"a"})


def zero_loss(logprobs, old_logprobs, advantages, mask, *, key=None):
    return 0.0 * logprobs, {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_generations": 4}, "no setting 'num_generations'; here it is group_size"),
        ({"response_length": "long"}, "response_length is 'long', but must be int"),
        ({"beta": 0.0}, "the weight of the KL to the reference is kl_coef"),
        ({"reward": lambda completions, **columns: 1}, "takes 'completions' first"),
        ({"prompts": "a text"}, "is one text"),
        ({"algorithm": "nonsense"}, "nonsense"),
        ({"reward": None}, "no reward"),
        ({"prompts": None}, "no prompts; give some"),
        ({"batch_size": 7}, "batch_size=7 does not divide into"),
        ({"group_sizze": 2}, "no setting 'group_sizze'; perhaps you meant group_size"),
        ({"advantage": "rloo", "group_size": 1}, "give group_size=2 or more"),
    ],
)
def test_what_python_cannot_train_with(tmp_path, given, words):
    settings = {"prompts": ["a"], "reward": right, "runs": str(tmp_path), **SMALL, **given}
    with pytest.raises(UserError) as error:
        train.policy(settings.pop("prompts"), settings.pop("reward"), **settings)
    assert words in str(error.value)
    assert not list(tmp_path.iterdir())


GAME = guess.make(n=9, guesses=2)


@pytest.mark.ci
def test_a_game_is_trained_on(tmp_path):
    """With its own instances and with columns; the score is the sum of the game's rewards. A
    resumed run needs the same game.
    """
    settings = {**SMALL, "runs": str(tmp_path), "stop": ("\n",), "name": "game"}
    del settings["response_length"]
    run = train.policy(environment=GAME, validation=GAME.instances(4, 1), **settings)
    metrics = run.metrics
    assert (metrics["invalid_rows"] == 0).all() and 0 <= metrics["validation_reward"][1] <= 1
    assert run.config.prompt_length == len("1-9\n") and "environment " in run.config.functions
    # 2 guesses of 3 bytes, with answers of 7: found, or without a second turn
    assert (metrics["length"] <= 6).all()
    episodes = run.play(GAME, GAME.instances(3, 5))
    assert len(episodes) == 3 and all(x.done and 1 <= len(x.turns) <= 2 for x in episodes)
    assert all(x.replies[0] in guess.REPLIES for x in episodes if len(x.turns) == 2)
    rows = [{"prompt": "guess:", "number": 1 + i % 9, "name": f"row {i}"} for i in range(8)]
    settings |= {"resume": True, "steps": 3}
    other = GAME.environment._replace(alphabet=GAME.environment.alphabet + b"!")
    with pytest.raises(UserError, match="other settings .* functions environment"):
        train.policy(GAME.instances(train.INSTANCES, 0), environment=other, **settings)
    own = {**settings, "name": "own", "steps": 1}
    own_reward = lambda prompt, response, name: float(name.startswith("row"))
    assert train.policy(rows, own_reward, environment=other, **own).metrics["reward"] == [1.0]


def throw(state, text, key, turn):
    """The policy reads a die, whatever it wrote, and its number of points is the reward."""
    die = jax.random.randint(key, (), 1, 7)
    return state, Answer(strings.write_integer(die, digits=1), die.astype(float), False)


DICE = from_rows(
    lambda instance: 0, throw, max_turns=2, turn_length=1, reply_length=1, alphabet=b"123456"
)


@pytest.mark.ci
def test_a_resumed_run_meets_the_same_chance(tmp_path, prompts):
    """Killed after step 2, it ends like a run without a break, bit for bit; the environment draws
    random numbers.
    """
    config, policy = load.load_policy(replace(RUN, response_length=episodes.response_length(DICE)))
    parts = algorithms.make_parts(config, in_program.episode_score)
    parts = parts._replace(environment=episodes.on_tokens(DICE, policy))
    go = lambda folder, **own: train.fit(
        replace(config, **own), policy, parts, prompts, folder=folder
    )
    straight = go(files.run_folder(tmp_path, "straight", resume=False))
    rows = rows_without_times(tmp_path / "straight")
    # the sum of two dice, a mean of 4 rows; no step throws those of another
    rewards = [row["reward"] for row in rows]
    assert all(abs(reward - 7) < 4 for reward in rewards) and len({*rewards}) > 2
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    resumed = go(tmp_path / "killed", resume=True)
    toys.assert_same(resumed, straight)
    assert rows_without_times(tmp_path / "killed") == rows


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"response_length": 21}, "need response_length=20, but it is 21"),
        ({"prompts": ["a"]}, "the column 'number', which is none of the prompts; .*: none"),
        ({"prompts": [{"prompt": "a", "number": "x"}]}, "'number', which has no number of 32 bits"),
        ({"environment": GAME.environment, "prompts": None}, "no prompts; give some"),
    ],
)
def test_what_no_environment_starts_from(tmp_path, given, words):
    settings = {**SMALL, "environment": GAME, "response_length": 20, "runs": str(tmp_path)}
    prompts = [{"prompt": "a", "number": 1}]
    with pytest.raises(UserError, match=words):
        train.policy(**{"prompts": prompts, **settings, **given})
    assert not list(tmp_path.iterdir())


@pytest.mark.ci
def test_a_policy_can_be_trained_twice(tmp_path, prompts):
    config, policy = load.load_policy(replace(RUN, steps=1))
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        found.append(
            train.fit(
                config,
                policy,
                algorithms.make_parts(config, reward),
                prompts,
                folder=tmp_path / name,
            )
        )
    toys.assert_same(found[0].params, found[1].params)
