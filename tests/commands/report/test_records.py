"""Reading runs that are complete, half written or damaged, and grouping them."""

import json
import math
from dataclasses import replace

import pytest
from runs import ROW, a_run, lines

from jaxppo.commands.report import records
from jaxppo.config import RunConfig
from jaxppo.errors import UserError
from jaxppo.run.settings import to_dict
from jaxppo.tasks import TaskConfig


def test_a_plain_run(tmp_path):
    run = records.read(
        a_run(
            tmp_path / "a",
            samples_jsonl=lines({"text": "x"}),
            command_txt="python a.py\npython a.py --resume\n",
        )
    )
    assert (run.name, run.is_task, run.config_folder, run.settings["steps"]) == (
        "a",
        False,
        tmp_path / "a",
        3,
    )
    assert [row["step"] for row in run.rows] == [1, 2, 3] and run.rows[0]["reward"] == 0.5
    assert run.samples == [{"text": "x"}] and run.commands == [
        "python a.py",
        "python a.py --resume",
    ]
    assert run.result == {} and run.versions == {} and run.notes == []


def test_compared_outputs_come_before_samples_of_training(tmp_path):
    texts = {"samples_jsonl": lines({"text": "x"}), "outputs_jsonl": lines({"text": "y"})}
    assert records.read(a_run(tmp_path / "a", **texts)).samples == [{"text": "y"}]


def test_a_task(tmp_path):
    root = tmp_path / "way"
    a_run(root / "supervised")
    a_run(root / "policy", TaskConfig(task="spelling", steps=3), command_txt="python spell.py\n")
    (root / "outputs.jsonl").write_text(
        lines({"prompt": "p", "supervised": "s", "policy": "t", "reference": "r"})
    )
    (root / "result.json").write_text(
        json.dumps({"versions": {"jax": "1"}, "policy": {"exact": 1.0}})
    )
    run = records.read(root)
    assert (run.name, run.is_task, run.config_folder) == ("way", True, root / "policy")
    assert (
        run.samples[0]["policy"] == "t"
        and run.versions == {"jax": "1"}
        and run.commands == ["python spell.py"]
    )
    alone = records.read(root / "policy")
    assert (alone.name, alone.is_task, alone.samples) == ("way/policy", False, [])


def test_versions_of_the_newest_checkpoint(tmp_path):
    folder = a_run(tmp_path / "a")
    place = folder / "checkpoints" / "3"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(json.dumps({"versions": {"jax": "2", "git": "abc"}}))
    assert records.read(folder).versions == {"jax": "2", "git": "abc"}


@pytest.mark.parametrize("name", ["nothing", "empty", "file", "other"])
def test_no_run(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other" / "config.json").mkdir(parents=True)
    with pytest.raises(
        UserError,
        match=f"^no run in .*{name}; give the folder that holds its config.json, or that of a task",
    ):
        records.read(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"steps": "many"}', '{"seed": [0]}', "\xff"])
def test_damaged_settings(tmp_path, text):
    folder = a_run(tmp_path / "a", config_json=text)
    with pytest.raises(UserError) as caught:
        records.read(folder)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_damaged_lines_are_counted_and_other_lines_read(tmp_path):
    text = lines(
        {"step": 1, **ROW},
        "{half",
        {"step": 3, "kl": 2},
        "[1]",
        "null",
        "\x00",
        "[" * 100_000,
        "",
        {"step": 4, "kl": "x"},
    )
    folder = a_run(
        tmp_path / "a",
        steps=4,
        metrics_jsonl=text,
        result_json="{half",
        samples_jsonl='{"a": "\u2028"}\n{"b',
    )
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "kl": 1}\n\xff\xfe\n{"step": 5, "k')
    run = records.read(folder)
    assert run.rows == [{"step": 1, **ROW}, {"step": 2, "kl": 1}, {"step": 3, "kl": 2}, {"step": 4}]
    assert run.samples == [{"a": "\u2028"}]  # a line end for str.splitlines, not here
    assert run.notes == [
        "metrics.jsonl: ignored 7 damaged lines",
        "result.json is damaged and was ignored",
        "samples.jsonl: ignored 1 damaged line",
    ]


def test_missing_strange_and_repeated_steps_are_noted(tmp_path):
    rows = [
        {"step": 1},
        {"step": 4, "kl": 1.0},
        {"step": 4, "kl": 2.0},
        {"step": True},
        {"step": -1},
        {"step": "2"},
        {"kl": 0},
    ]
    run = records.read(a_run(tmp_path / "a", metrics_jsonl=lines(*rows)))
    assert run.rows == [{"step": 1}, {"step": 4, "kl": 2.0}]
    assert run.notes == [
        "metrics.jsonl: ignored 4 lines without a step",
        "metrics.jsonl: 1 repeated step; the last line counts",
        "metrics.jsonl: 2 of the first 4 steps are missing",
    ]


def test_huge_and_non_finite_numbers(tmp_path):
    run = records.read(
        a_run(
            tmp_path / "a",
            metrics_jsonl='{"step": 1, "kl": 1' + "0" * 400 + ', "x": NaN, "y": -Infinity}\n',
        )
    )
    assert (
        run.rows[0]["kl"] == math.inf
        and math.isnan(run.rows[0]["x"])
        and run.rows[0]["y"] == -math.inf
    )


def test_update_metrics_are_nan_where_every_minibatch_was_skipped(tmp_path):
    """The means are over nothing then; the reward is still that of the rollouts."""
    sick = {
        "step": 2,
        "reward": 0.5,
        "entropy": 0.0,
        "loss": 0.0,
        "skipped": 4.0,
        "barren_steps": 1.0,
    }
    run = records.read(
        a_run(tmp_path / "a", metrics_jsonl=lines(sick | {"step": 1, "barren_steps": 0.0}, sick))
    )
    assert (
        run.rows[0]["entropy"] == 0
        and math.isnan(run.rows[1]["entropy"])
        and math.isnan(run.rows[1]["loss"])
    )
    assert run.rows[1]["reward"] == 0.5


def test_faults(tmp_path):
    rows = [
        {
            "step": 1,
            "skipped": 1.0,
            "invalid_rows": 2.0,
            "stopped": 3.0,
            "empty": 0.0,
            "barren_steps": 0.0,
            "first_ratio_off": 1e-6,
        },
        {
            "step": 2,
            "skipped": 4.0,
            "invalid_rows": 1.0,
            "stopped": 0.0,
            "empty": 1.0,
            "barren_steps": 1.0,
            "kl": math.nan,
        },
        {
            "step": 3,
            "skipped": 0.0,
            "invalid_rows": math.nan,
            "barren_steps": 0.0,
            "first_ratio_off": 2e-6,
        },
    ]
    found = records.faults(records.read(a_run(tmp_path / "a", metrics_jsonl=lines(*rows))))
    assert list(found.values()) == [5, 3, 1, 3, 1, 2, 2e-6]
    nothing = records.faults(records.read(a_run(tmp_path / "b", metrics_jsonl="")))
    assert list(nothing.values())[:4] == [0, 0, 0, 0]


def test_runs_that_differ_only_by_chance_are_one_group(tmp_path):
    base = RunConfig(steps=3)
    same = [
        replace(base, name="a-0"),
        replace(
            base,
            name="a-1",
            seed=1,
            runs="elsewhere",
            resume=True,
            parallel="pmap",
            track="wandb",
            save_every=7,
        ),
    ]
    others = [
        replace(base, name="b", lr=0.5),
        replace(base, name="c", steps=4),
        replace(base, name="d", lr=0.5, seed=3),
        replace(base, name="e", prompt_format="Q: {prompt}", seed=3),
    ]
    runs = [
        records.read(a_run(tmp_path / x.name, x))
        for x in [same[0], others[0], same[1], *others[1:]]
    ]
    found = records.groups(runs)
    assert [[run.name for run in group.runs] for group in found] == [
        ["a-0", "a-1"],
        ["b", "d"],
        ["c"],
        ["e"],
    ]
    assert [group.label for group in found] == ["a", "b and 1 more", "c", "e"]


def test_settings_missing_in_an_old_run_have_their_defaults(tmp_path):
    old = to_dict(RunConfig(steps=3))
    del old["track"], old["kl_stop"]
    runs = [
        records.read(a_run(tmp_path / "a", config_json=json.dumps(old))),
        records.read(a_run(tmp_path / "b")),
    ]
    assert len(records.groups(runs)) == 1


def test_paths_inside_the_run_do_not_separate_seeds(tmp_path):
    for seed in (0, 1):
        root = tmp_path / f"way-{seed}"
        model = str(root / "supervised" / "model")
        a_run(
            root / "policy",
            TaskConfig(
                task="spelling", steps=3, seed=seed, runs=str(root), name="policy", model=model
            ),
        )
    runs = [records.read(tmp_path / f"way-{seed}") for seed in (0, 1)]
    (group,) = records.groups(runs)
    assert (
        group.label == "way"
        and records.group_settings(runs[0])["model"] == "<run>/supervised/model"
    )


def test_labels_are_unique(tmp_path):
    runs = [
        records.read(a_run(tmp_path / place / "a", RunConfig(lr=lr)))
        for place, lr in (("x", 0.1), ("y", 0.2), ("z", 0.3))
    ]
    assert [group.label for group in records.groups(runs)] == ["a", "a (2)", "a (3)"]
