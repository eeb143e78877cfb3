"""The loop with a step that computes nothing: who is told what and when, and every reason to
stop.
"""

import contextlib
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import RUN

from jaxppo import ppo
from jaxppo.data.prompts import PromptSet
from jaxppo.errors import Diverged, Interrupted, RunError, UserError
from jaxppo.run import checkpoint, log, loop, profiling, stopwatch

CONFIG = replace(RUN, steps=6, save_every=2, eval_every=3)
PROMPTS = PromptSet(np.ones((4, 4), np.int32), np.ones((4, 4), bool))


class Step:
    """Counts, and does something of the test's at a step."""

    def __init__(self, at=lambda step: None, metrics=lambda step: {}):
        self.at, self.metrics, self.traces = at, metrics, 1

    def place(self, state):
        return state

    def put(self, prompts):
        return prompts

    def unreplicate(self, state):
        return state

    def __call__(self, state, prompts):
        state = state.replace(step=state.step + 1, cursor=state.cursor + 4)
        self.at(int(state.step))
        row = {
            "reward": 1.0,
            "length": 2.0,
            "kl": 0.5,
            "barren_steps": 0.0,
            "invalid_rows": 0.0,
        } | self.metrics(int(state.step))
        return state, {name: jnp.float32(x) for name, x in row.items()}


class Record(log.Log):
    def __init__(self):
        self.rows, self.said, self.flushed = [], [], []

    def log(self, rows):
        self.rows += rows

    def say(self, text):
        self.said.append(text)

    def flush(self):
        self.flushed.append(len(self.rows))


@pytest.fixture
def world(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep_every=1)
    yield SimpleNamespace(checkpoints=checkpoints, log=Record(), folder=tmp_path)
    checkpoints.close()


def go(world, step, config=CONFIG, evaluate=None, start=0, past=(), prompts=PROMPTS):
    state = ppo.init_state(
        config,
        {"w": jnp.zeros(2)},
        {"base": {}, "reference": None, "reward": {}},
        jax.random.key(0),
    )
    state = state.replace(step=jnp.asarray(start, jnp.int32))
    meter, trace = profiling.Meter(step), profiling.Trace(config, world.folder)
    with contextlib.closing(meter), contextlib.closing(trace):
        return loop.run(
            config,
            step,
            state,
            prompts,
            log=world.log,
            checkpoints=world.checkpoints,
            evaluate=evaluate,
            meter=meter,
            trace=trace,
            past=past,
        )


def test_every_step_is_logged_once_and_saved_when_it_should(world):
    state = go(world, Step(), evaluate=lambda state: {"score": float(state.step)})
    assert int(state.step) == 6
    assert [row["step"] for row in world.log.rows] == [1, 2, 3, 4, 5, 6]
    assert [row.get("validation_score") for row in world.log.rows] == [
        None,
        None,
        3.0,
        None,
        None,
        6.0,
    ]
    assert world.checkpoints.steps() == [2, 3, 4, 6]
    assert world.checkpoints.scores == {
        2: None,
        3: 3.0,
        4: None,
        6: 6.0,
    }  # a batch's reward is no score beside a validation's
    assert world.log.said == []


def test_what_was_logged_is_flushed_before_each_checkpoint(world, monkeypatch):
    """A checkpoint whose steps' numbers were lost with the process would never get them again."""
    save, before = world.checkpoints.save, []
    monkeypatch.setattr(
        world.checkpoints,
        "save",
        lambda *a, **k: (before.append(list(world.log.flushed)), save(*a, **k)),
    )
    go(world, Step(), evaluate=lambda state: {"score": 1.0})
    assert before == [
        [2],
        [2, 3],
        [2, 3, 4],
        [2, 3, 4, 6],
    ]  # each after as many rows; step 3 is the first that is evaluated


def test_without_a_validation_the_batch_decides(world):
    go(world, Step(metrics=lambda step: {"reward": step / 2}))
    assert world.checkpoints.scores == {2: 1.0, 4: 2.0, 6: 3.0}
    assert (
        loop.checkpoint_score({"loss": 0.5}) == -0.5
        and loop.checkpoint_score({"loss": 0.5, "reward": 2.0}) == 2.0
    )


def test_each_step_takes_the_next_prompts(world):
    """4 rows are 2 prompts of 2 rows each."""
    asked = []
    source = SimpleNamespace(batches=lambda config, cursor: asked.append(cursor))
    go(world, Step(), replace(CONFIG, group_size=2, steps=3), prompts=source)
    assert asked == [0, 2, 4]


def test_the_last_step_is_evaluated(world):
    """Step 5, beside every third."""
    config = replace(CONFIG, steps=5)
    go(world, Step(), config, evaluate=lambda state: {"score": float(state.step)})
    assert [row["step"] for row in world.log.rows if "validation_score" in row] == [3, 5]


def test_with_patience_the_best_batch_is_kept(world):
    """There is no validation: of steps 3 and 6 the better is 3, which no `save_every` names."""
    rewards = [0.0, 0.0, 9.0, 0.0, 0.0, 1.0]
    step = Step(metrics=lambda step: {"reward": rewards[step - 1]})
    go(world, step, replace(CONFIG, patience=5, save_every=100))
    assert world.checkpoints.scores == {3: 9.0, 6: 1.0}


def test_patience_ends_the_run_and_keeps_the_best(world):
    """Validated at every step: 1, 3, 2, 3, ...: step 2 is the best, steps 3 and 4 are no better."""
    config = replace(CONFIG, eval_every=1, patience=2, save_every=100)
    found = {1: 1.0, 2: 3.0, 3: 2.0, 4: 3.0, 5: 9.0}
    state = go(world, Step(), config, evaluate=lambda state: {"score": found[int(state.step)]})
    assert int(state.step) == 4
    assert world.log.said == ["stopped after step 4: no better validation in 2 evaluations"]
    assert world.checkpoints.scores == {
        1: 1.0,
        2: 3.0,
        4: 3.0,
    }  # the good ones are saved as they come, and the last
    found = dict.fromkeys(range(1, 7), 0.0)
    assert (
        int(
            go(
                world, Step(), replace(config, patience=0), evaluate=lambda state: {"score": 0.0}
            ).step
        )
        == 6
    )


def test_the_best_is_kept_between_two_saves(world):
    """Evaluated at steps 3 and 6, saved at 2, 4 and 6: step 3 is the best, with patience or
    without.
    """
    found = {3: 9.0, 6: 1.0}
    go(
        world,
        Step(),
        replace(CONFIG, eval_every=3, save_every=2),
        evaluate=lambda state: {"score": found[int(state.step)]},
    )
    assert world.checkpoints.best_step() == 3 and world.checkpoints.scores[3] == 9.0


def test_patience_remembers_what_was_before(world):
    """Gone on with after step 3 of 1, 3, 2: one evaluation was worse already, and one more ends it;
    after step 4 nothing runs.
    """
    config = replace(CONFIG, eval_every=1, patience=2, save_every=100)
    past = [
        {"step": k, "reward": 0.0, "validation_score": x} for k, x in enumerate([1.0, 3.0, 2.0], 1)
    ]
    assert (
        int(
            go(
                world, Step(), config, start=3, evaluate=lambda state: {"score": 2.5}, past=past
            ).step
        )
        == 4
    )
    past += [{"step": 4, "reward": 0.0, "validation_score": 2.5}]
    assert (
        int(
            go(
                world,
                Step(at=lambda step: 1 / 0),
                config,
                start=4,
                evaluate=lambda state: 1 / 0,
                past=past,
            ).step
        )
        == 4
    )
    assert (
        world.log.said[-1]
        == "already stopped early, at step 4: no better validation in 2 evaluations"
    )
    rewards = [
        {"step": k, "reward": x} for k, x in enumerate([3.0, 1.0, 2.0], 1)
    ]  # without a validation they are the score
    assert int(go(world, Step(at=lambda step: 1 / 0), config, start=3, past=rewards).step) == 3


def test_at_the_last_step_there_is_nothing_to_do(world):
    assert int(go(world, Step(at=lambda step: 1 / 0), start=6).step) == 6
    assert world.log.rows == [] and world.checkpoints.steps() == []


def test_a_signal_finishes_the_step_saves_and_says_75(world):
    send = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    with pytest.raises(
        Interrupted, match="stopped after step 3, which is saved; continue with --resume"
    ) as caught:
        go(world, Step(at=send), evaluate=lambda state: 1 / 0)  # no time for that now
    assert caught.value.code == 75
    assert [row["step"] for row in world.log.rows] == [1, 2, 3]
    assert world.checkpoints.steps() == [2, 3]


def test_a_signal_whose_state_cannot_be_saved_is_no_75(world, monkeypatch):
    monkeypatch.setattr(checkpoint.manifest, "seal", lambda *_: 1 / 0)
    send = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None
    with pytest.raises(RunError, match="the checkpoint of step 1 could not be written") as caught:
        go(world, Step(at=send))
    assert caught.value.code == 1


@pytest.mark.parametrize("limit", [1, 3])
def test_steps_without_a_finite_update_end_the_run(world, limit):
    """Bad from step 2 on: `limit` of them are found out one step later, and nothing more is
    saved.
    """
    bad = lambda step: {"barren_steps": max(0.0, step - 1.0), "kl": float("nan")}
    with pytest.raises(
        Diverged, match=f"no finite update in the {limit} steps up to step {1 + limit}; the newest"
    ) as caught:
        go(
            world,
            Step(metrics=bad),
            replace(CONFIG, max_bad_steps=limit, save_every=6, eval_every=0),
        )
    assert caught.value.code == 76
    assert world.checkpoints.steps() == []


def test_bad_steps_that_are_not_in_a_row_do_not(world):
    go(
        world,
        Step(metrics=lambda step: {"barren_steps": float(step % 2)}),
        replace(CONFIG, max_bad_steps=2),
    )


def test_too_many_invalid_rewards(world):
    """Of 4 rows 1 is 25 %."""
    one = Step(metrics=lambda step: {"invalid_rows": float(step == 2)})
    go(world, one, replace(CONFIG, max_invalid_rewards=0.25))
    with pytest.raises(
        UserError, match=r"25% of the rewards of step 2 are invalid \(--max-invalid-rewards 10%\)"
    ) as caught:
        go(world, one)
    assert caught.value.code == 2
    # of 2 · 4 rows that are made 1 is 12.5 %
    twice = replace(CONFIG, group_size=2, oversample=2, filter_groups=True)
    go(world, one, replace(twice, max_invalid_rewards=0.125))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (0.0, "75% of the rewards of step 1 are invalid .* fix the reward function"),
        (1.0, "75% of the rewards of step 1 are invalid .* fix the reward function"),
        (2.0, "50% of the rows of step 1 have logits that are NaN or infinite .* not the reward"),
    ],
)
def test_rows_without_logits_are_not_blamed_on_the_reward(world, rows, words):
    """3 of 4 rows are invalid, 2 of them by their logits."""
    bad = Step(metrics=lambda step: {"invalid_rows": 3.0, "nonfinite_rows": rows})
    with pytest.raises(UserError, match=words) as caught:
        go(world, bad)
    assert caught.value.code == 2


def test_a_failed_save_is_told_at_the_next_step_and_the_third_ends_the_run(world, monkeypatch):
    monkeypatch.setattr(checkpoint.manifest, "seal", lambda *_: 1 / 0)
    slow = lambda step: world.checkpoints.wait()
    with pytest.raises(
        RunError, match="step 3 could not be written .*, 3 times in a row now; no step is safe"
    ):
        go(world, Step(at=slow), replace(CONFIG, save_every=1, eval_every=0))
    assert [text[:43] for text in world.log.said] == [
        f"warning: the checkpoint of step {step} could not" for step in (1, 2)
    ]


def test_a_last_save_that_fails_is_an_error(world, monkeypatch):
    monkeypatch.setattr(checkpoint.manifest, "seal", lambda *_: 1 / 0)
    with pytest.raises(RunError, match="the checkpoint of step 6 could not be written"):
        go(world, Step(), replace(CONFIG, save_every=6, eval_every=0))


def test_slow_dispatches_are_warned_about_once(world, monkeypatch):
    """Clock readings of 20 s from one to the next: two of a batch (idle) and two of a step."""
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    go(world, Step(), replace(CONFIG, eval_every=0))
    assert len(world.log.said) == 1 and "s, and a preempted machine has 30 s" in world.log.said[0]


def test_a_step_that_is_compiled_again_is_told_once(world):
    step = Step(at=lambda number: setattr(step, "traces", 1 + (number >= 3)))
    go(world, step, replace(CONFIG, eval_every=0))
    assert [row["recompilations"] for row in world.log.rows] == [0, 0, 1, 1, 1, 1]
    assert [text.split("(")[0] for text in world.log.said] == [
        "warning: the step was compiled again "
    ]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"reward_std": 0.0, "informative": 0.0}, "all rewards of the first 3 steps are equal"),
        ({"reward_std": 0.5, "informative": 0.0}, "all samples of a prompt had the same reward"),
        ({"reward_std": 0.5, "informative": 0.1}, ""),
        ({"reward_std": 0.5}, ""),
    ],
)
def test_rewards_without_spread_are_warned_about_once(world, metrics, words):
    go(world, Step(metrics=lambda step: metrics))
    assert len(world.log.said) == (words != "") and all(words in text for text in world.log.said)


def test_with_a_teacher_equal_rewards_are_no_suspicion(world):
    go(world, Step(metrics=lambda step: {"reward_std": 0.0}), replace(CONFIG, teacher="self"))
    assert world.log.said == []


def test_one_step_with_spread_ends_the_suspicion(world):
    go(world, Step(metrics=lambda step: {"reward_std": float(step == 2)}))
    assert world.log.said == []


def test_an_average_of_the_weights_is_evaluated():
    """It stays at 1, where the weights are 3."""
    settings, frozen = replace(CONFIG, ema_decay=0.5), {"base": {}, "reference": None, "reward": {}}
    state = ppo.init_state(settings, {"w": jnp.ones(2)}, frozen, jax.random.key(0))
    state = state.replace(params={"w": 3 * jnp.ones(2)})
    found = loop.validation_metrics(lambda state: {"w": state.params["w"].sum()}, state)
    assert found == {"validation_w": 2.0}
