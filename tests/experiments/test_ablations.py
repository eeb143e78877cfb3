"""The ablation scripts at smoke size, as a user calls them."""

import dataclasses
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from jaxppo import algorithms
from jaxppo import config as config_of
from jaxppo.ablation.question import AblationConfig, arm_settings
from jaxppo.run import files
from jaxppo.tasks import TaskConfig
from jaxppo.tasks.datasets import reasoning

pytestmark = pytest.mark.ci
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RESULTS = EXPERIMENTS / "results" / "ablations"
QUESTIONS = sorted(
    path.stem for path in (EXPERIMENTS / "ablations").glob("*.py") if path.stem != "scales"
)


def run(script: str, *args: str, cwd: Path) -> str:
    """Run a script in its own process, in the folder `cwd`, with one device; returns what it
    prints.
    """
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(EXPERIMENTS / f"{script}.py"), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def refused(monkeypatch, capsys):
    """Call a script in this process; returns the message with which it exits with code 2."""

    def call(script: str, *args: str) -> str:
        path = EXPERIMENTS / f"{script}.py"
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setattr(sys, "argv", [str(path), *args])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        assert stop.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.mark.slow
@pytest.mark.parametrize("name", QUESTIONS)
def test_an_ablation(tmp_path, name):
    out = run(f"ablations/{name}", "--tiny", "--results", str(tmp_path), cwd=tmp_path)
    record = json.loads((tmp_path / f"{name}-ladder-tiny.json").read_text())
    assert record["question"] == name and {row["seed"] for row in record["runs"]} == {0, 1}
    for claim in record["claims"]:
        assert (
            claim["verdict"] in ("agrees", "disagrees", "not decided")
            and f"{claim['says']}: {claim['verdict']}" in out
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gamma", "architectures"])
def test_an_ablation_of_a_language_task(tmp_path, name):
    run(f"ablations/{name}", "--tiny", "--scale", "small", "--results", str(tmp_path), cwd=tmp_path)
    record = json.loads((tmp_path / f"{name}-small-tiny.json").read_text())
    assert record["tasks"] == ["spelling"] and record["config"]["task"] == "spelling"
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.slow
def test_an_ablation_on_smollm2_reuses_finished_runs(tmp_path):
    """--tiny replaces SmolLM2 by a random network. The second call trains nothing."""
    call = lambda: run(
        "ablations/controller",
        "--tiny",
        "--scale",
        "smollm2",
        "--results",
        str(tmp_path),
        cwd=tmp_path,
    )
    assert call().count("step 2/2") == 6  # three arms, two seeds
    first = json.loads((tmp_path / "controller-smollm2-tiny.json").read_text())
    assert list(first["arms"]) == ["none", "fixed .1", "adaptive, 3 nats"]
    pairs = {
        (claim["better"], claim["worse"]) for claim in first["claims"]
    }  # those of the three arms, and no others
    assert pairs == {
        ("adaptive, 3 nats", "none"),
        ("adaptive, 3 nats", "fixed .1"),
        ("fixed .1", "none"),
    }
    assert "gold" in first["runs"][0] and first["runs"][0]["versions"] == first["about"]["versions"]
    assert call().count("step 2/2") == 0
    assert (
        json.loads((tmp_path / "controller-smollm2-tiny.json").read_text())["runs"] == first["runs"]
    )


@pytest.mark.parametrize("name", ["advantages", "controller", "epochs", "kl"])
@pytest.mark.parametrize("tiny", [False, True])
def test_settings_on_smollm2_can_run(monkeypatch, name, tiny):
    """Without a run: check the arms and sizes that each script asks for."""
    monkeypatch.syspath_prepend(EXPERIMENTS / "ablations")
    scales, script = importlib.import_module("scales"), importlib.import_module(name)
    asked = {}
    monkeypatch.setattr(
        script, "run", lambda question, options, **settings: asked.update(settings["smollm2"])
    )
    script.main(AblationConfig(scale="smollm2", tiny=tiny))
    arms = asked.pop("arms")
    assert 2 <= len(arms) <= 3  # nine runs at most
    for arm in arms:
        config = scales.smollm2(tiny, **asked).config
        own = dataclasses.replace(config, **arm_settings(config, script.QUESTION.arms[arm]))
        config_of.validate_run(own)
        algorithms.check(own)


def test_a_question_without_arms_for_a_scale(refused, tmp_path):
    out = refused("ablations/gamma", "--scale", "smollm2", "--results", str(tmp_path))
    assert "error: --scale smollm2: gamma has no arms for it" in out


def test_games_are_asked_about_on_the_ladder_alone(refused, tmp_path):
    out = refused("ablations/turns", "--scale", "small", "--results", str(tmp_path))
    assert "error: --scale small has no games; leave it at ladder" in out


def test_an_unknown_scale_is_refused(refused, tmp_path):
    out = refused("ablations/gamma", "--scale", "huge", "--results", str(tmp_path))
    assert "error: --scale 'huge': choose one of ladder, small, smollm2" in out


@pytest.mark.slow
def test_a_sweep_prints_its_speedup(tmp_path):
    out = run(
        "sweep",
        "--tiny",
        "--seeds",
        "2",
        "--tasks",
        "token",
        "--sweep",
        "lr=1e-3,3e-3",
        "--results",
        str(tmp_path),
        cwd=tmp_path,
    )
    assert re.search(
        r"a step of 2 runs at once: [\d.]+ s; of one alone: [\d.]+ s; "
        r"one after the other they would take [\d.]+ times",
        out,
    )
    assert set(json.loads((tmp_path / "sweep-ladder-tiny.json").read_text())["arms"]) == {
        "lr 0.001",
        "lr 0.003",
    }


@pytest.mark.slow
def test_tuning_writes_a_file_of_settings(tmp_path):
    file = tmp_path / "tuned.yaml"
    small = ["--tiny", "--candidates", "4", "--keep", "2", "--check", "2", "--out", str(file)]
    out = run("tune", *small, "--ranges", "lr=1e-4:1e-2:log", "lam=.8:1", cwd=tmp_path)
    assert len(re.findall("tune: mean", out)) == 2  # four candidates, then two
    assert "written: " in out and {
        line.split(":")[0] for line in file.read_text().splitlines()
    } == {"lr", "lam", "steps"}
    # any script takes the file
    run(
        "sweep",
        "--tiny",
        "--no-alone",
        "--seeds",
        "2",
        "--tasks",
        "token",
        "--config",
        str(file),
        "--results",
        str(tmp_path),
        cwd=tmp_path,
    )
    settings = json.loads((tmp_path / "sweep-ladder-tiny.json").read_text())["config"]
    assert f"lr: {settings['lr']}" in file.read_text()


def test_keep_must_be_at_least_two(refused, tmp_path):
    assert "--keep 1: one in so many candidates is kept" in refused(
        "tune", "--keep", "1", "--out", str(tmp_path / "x.yaml")
    )


@pytest.mark.parametrize("text", ["lr=0:1:log", "lr=1:2:exp", "loss=1:2", "lr=.1"])
def test_a_wrong_range_is_refused(refused, tmp_path, text):
    out = refused("tune", "--ranges", text, "--out", str(tmp_path / "x.yaml"))
    assert out.count("error: --") == 1 and not (tmp_path / "x.yaml").exists()


@pytest.mark.slow
def test_the_benchmark_of_sweeps(tmp_path):
    small = ["--seeds", "2", "--steps", "8", "--batch-size", "16", "--width", "32"]
    out = run("benchmarks/sweep", *small, cwd=tmp_path)
    assert len(re.findall(r"^\| ratio \|", out, re.M)) == 2
    assert float(re.findall(r"differ by at most ([\d.]+)", out)[0]) < 0.05


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_records_have_versions_and_no_paths(path):
    record = json.loads(path.read_text())
    assert not re.search(r"/(tmp|home|root|work)/", path.read_text())
    assert (
        set(files.versions()) == set(record["about"]["versions"]) and record["about"]["minutes"] > 0
    )
    counts = {len([row for row in record["runs"] if row["arm"] == arm]) for arm in record["arms"]}
    assert len(counts) == 1  # none was dropped


def test_the_words_of_the_small_scale(monkeypatch):
    """They stay as short as those of its records when the task's own get longer."""
    pytest.importorskip("reasoning_gym", reason="puzzles need the extra `reasoning`")
    monkeypatch.syspath_prepend(EXPERIMENTS / "ablations")
    scales = importlib.import_module("scales")
    options = TaskConfig(task="spelling", tiny=True)
    words = [x for part in scales.short_words(options) for x in part]
    assert len(words) == 200 and all(x.prompt == x.reference[::-1] for x in words)
    assert {len(x.prompt) for x in words} == {3, 4, 5, 6, 7, 8}
    task = [x for part in reasoning.load("spell_backward", 200) for x in part]
    assert max(len(x.reference) for x in task) > 8
