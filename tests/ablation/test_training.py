import dataclasses
import math
import types

import jax.numpy as jnp
import numpy as np
from toy_scale import CONFIG, SCALE

from jaxppo.ablation import toy_tasks
from jaxppo.ablation.question import Arm
from jaxppo.ablation.sweep import Result, Run
from jaxppo.ablation.training import group_by_program, judge_policies, summarise


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
        state = types.SimpleNamespace(params=policy.params, frozen=policy.frozen)
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
