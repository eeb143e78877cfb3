import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_scale import CONFIG, SCALE

from jaxppo import ppo
from jaxppo.ablation import toy_tasks, training
from jaxppo.ablation.question import Arm
from jaxppo.ablation.sweep import Result, Run
from jaxppo.ablation.training import (
    group_by_program,
    judge_policies,
    run_key,
    summarise,
    train_groups,
)
from jaxppo.run import files


@pytest.mark.ci
def test_the_judge_reads_the_same_number_of_rollouts_of_every_arm():
    """256 rollouts of the judge's prompts, with batches of 16 or 64 rows."""
    seen = []

    class Dealt:
        def batches(self, config, cursor):
            seen.append((config.rows, cursor))
            return toy_tasks.RandomPrompts("token").batches(config, cursor)

    scale = SCALE._replace(
        judge=lambda rollout: {"n": jnp.float32(rollout.mask.shape[0])}, unseen=lambda run: Dealt()
    )
    for size in (16, 64):
        config = dataclasses.replace(CONFIG, batch_size=size)
        policy = toy_tasks.load(config)
        state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
        run = Run("a", 0, {"batch_size": size})
        (found,) = judge_policies(scale, [Result(run, {}, state)])
        assert found == {"n": size}
    assert [rows for rows, _ in seen] == [16] * 16 + [64] * 4
    assert (
        len({cursor for _, cursor in seen[:16]}) == 16
        and min(cursor for _, cursor in seen) == 2**30
    )


def test_summary_of_a_run():
    names = ("reward", "kl", "entropy", "length", "skipped", "barren_steps", "first_ratio_off")
    metrics = {name: np.zeros(40) for name in names}
    metrics["reward"][36:] = [1, 2, 3, 4]
    metrics["skipped"][3] = 1  # once is enough to count as diverged
    metrics["first_ratio_off"][7] = 0.5
    metrics["entropy"][:] = 2.0
    metrics["entropy"][20:] = 0.0  # ignored: none of these steps had a finite update
    metrics["barren_steps"][20:] = np.arange(1, 21)
    found = summarise(metrics)
    assert (
        found["end"] == 2.5
        and found["area"] == 0.25
        and found["diverged"] == 1.0
        and found["first_ratio_off"] == 0.5
    )
    assert found["mean_entropy"] == 2.0 and math.isnan(found["entropy"])


def test_a_killed_ablation_trains_only_what_is_missing(tmp_path, monkeypatch, capsys):
    trained: list[str] = []

    def train_group(scale, arm, runs):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.extend(run.arm for run in runs)
        return [{"arm": run.arm, "end": math.nan, "kl": 0.1} for run in runs]

    monkeypatch.setattr(training, "train_group", train_group)
    groups = [
        (Arm(), [Run("a", seed, {"lr": 1e-3}) for seed in (0, 1)]),
        (Arm(), [Run("b", 0, {})]),
    ]
    place = tmp_path / "runs" / "q.jsonl"
    with pytest.raises(KeyboardInterrupt):
        train_groups(SCALE, groups, place, True)  # an empty disk
    with place.open("a") as file:
        file.write('{"key": "half a l')
    trained.append("third")  # 3 from here on: nothing is interrupted
    found = train_groups(SCALE, groups, place, True)
    assert trained == ["a", "a", "third", "b"]
    assert [row["arm"] for row in found] == ["a", "a", "b"] and "key" not in found[0]
    assert math.isnan(found[0]["end"]) and found[2]["kl"] == 0.1
    assert len(files.read_jsonl(place)) == 3
    assert "0 of 3 runs are finished" in (said := capsys.readouterr().out)
    assert "2 of 3 runs are finished" in said
    train_groups(SCALE, groups, place, False)  # from the beginning
    assert trained[4:] == ["a", "a", "b"]


def test_what_decides_a_run_is_in_its_key():
    run, arm = Run("a", 0, {"lr": 1e-3}, "token"), Arm()
    key = run_key(SCALE, arm, run)
    other = lambda **changes: SCALE._replace(config=dataclasses.replace(CONFIG, **changes))
    assert run_key(other(name="other", runs="there", resume=True), arm, run) == key
    assert run_key(other(layout="dense"), arm, run) == key  # as --resume of a run has it
    different = [
        run_key(other(steps=99), arm, run),
        run_key(other(gamma=0.5), arm, run),
        run_key(SCALE._replace(judge=None), arm, run),
        run_key(SCALE, Arm(parts=run_key), run),
        run_key(SCALE, arm, run._replace(seed=1)),
        run_key(SCALE, arm, run._replace(task="prompt")),
        run_key(SCALE, arm, run._replace(settings={"lr": 2e-3})),
        run_key(SCALE, arm, run._replace(arm="b")),
    ]
    assert len({key, *different}) == 9


def test_arms_share_programs_where_they_can():
    other = lambda parts: parts
    arms = {
        "a": Arm({"lr": 1e-3}),
        "b": Arm({"lr": 2e-3}),
        "c": Arm({"loss": "gspo"}),
        "d": Arm({"lr": 1e-3}, parts=other),
        "plain": Arm(),
    }
    runs = [(name, arm, "token", seed) for name, arm in arms.items() for seed in (0, 1, 2)]
    found = group_by_program(SCALE, runs, 100)
    assert [sorted({run.arm for run in group}) for _, group in found] == [
        ["a", "b", "plain"],
        ["c"],
        ["d"],
    ]
    assert {run.settings["lr"] for run in found[0][1]} == {1e-3, 2e-3, CONFIG.lr}
    # nine runs, four at once: three programs of three, so that one shape serves them
    assert [len(group) for _, group in group_by_program(SCALE, runs, 4)] == [3, 3, 3, 3, 3]


def test_a_task_with_settings_of_its_own_is_a_program_of_its_own():
    scale = SCALE._replace(of_task={"prompt": {"response_length": 9}})
    arms = {"a": Arm({"lr": 1e-3}), "b": Arm({"response_length": 5})}
    rows = [(name, arm, task, 0) for name, arm in arms.items() for task in ("token", "prompt")]
    found = [[(run.arm, run.task) for run in runs] for _, runs in group_by_program(scale, rows, 9)]
    # the task's length goes before the arm's
    assert found == [[("a", "token")], [("a", "prompt"), ("b", "prompt")], [("b", "token")]]
    lengths = [
        runs[0].settings.get("response_length") for _, runs in group_by_program(scale, rows, 9)
    ]
    assert lengths == [None, 9, 5]
