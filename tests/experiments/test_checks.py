"""What can be refused is refused before anything is downloaded, made or trained."""

from dataclasses import replace

import pytest
from runs import run_script

from jaxppo import cli, pretrained
from jaxppo.commands.train import TrainOptions, train
from jaxppo.data import examples, fetch, sentiment
from jaxppo.errors import UserError
from jaxppo.run import load, start
from jaxppo.tasks import TaskConfig, sources, stages

SCRIPTS = [
    "adversarial",
    "classify",
    "dialogue",
    "distil",
    "entities",
    "few_shot",
    "multitask",
    "pretrain",
    "question_answering",
    "reasoning",
    "reward_model",
    "sentiment",
    "sentiment_label",
    "sft",
    "speech",
    "summarisation",
    "translation",
]


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Fail where data, a checkpoint or a download would be read."""

    def fail(*args, **named):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(fetch, "fetch", fail)
    monkeypatch.setattr(sentiment, "load_reviews", fail)
    monkeypatch.setattr(sources, "load_examples", fail)
    monkeypatch.setattr(examples, "load", fail)
    for name in ("load", "_load_bundled", "_load_folder"):
        monkeypatch.setattr(pretrained, name, fail)
    for name in ("load_policy", "make_policy"):
        monkeypatch.setattr(load, name, fail)


@pytest.mark.ci
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("tiny", [[], ["--tiny"]], ids=["whole", "tiny"])
def test_a_script_checks_its_devices_first(nothing_loaded, script, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(script, "--expect-devices", "3", "--runs", str(tmp_path), *tiny)
    assert stop.value.code == 2
    assert "--expect-devices 3, but there are 8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_checks_its_folder_first(nothing_loaded, script, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        run_script(script, "--runs", str(tmp_path), "--name", "a")
    assert stop.value.code == 2
    assert f"{tmp_path / 'a'} exists: choose another --name" in capsys.readouterr().err


@pytest.mark.ci
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("tiny", [[], ["--tiny"]], ids=["whole", "tiny"])
def test_a_script_checks_the_settings_to_resume_first(
    nothing_loaded, script, tiny, tmp_path, capsys
):
    for folder in (tmp_path / "a", tmp_path / "a" / "supervised"):
        (folder / "checkpoints" / "0").mkdir(parents=True)
        (folder / "config.json").write_text('{"seed": 7}')
    with pytest.raises(SystemExit) as stop:
        run_script(script, "--runs", str(tmp_path), "--name", "a", "--resume", *tiny)
    assert stop.value.code == 2
    assert "another run: --seed 7 -> 0; start one under" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--expect-devices", "3"], "--expect-devices 3, but there are 8"),
        (["--name", "a"], "a exists: choose another --name"),
        (["--name", "b", "--resume"], "another run: --seed 7 -> 0; start one under another --name"),
        (["--reward-model", "nowhere"], "--reward-model nowhere: there is no run"),
        (
            ["--batch-size", "8", "--parallel", "pmap"],
            "--batch-size 8 does not divide into 8 devices x 4 minibatches; use --batch-size 32, "
            "or 2 devices, or --minibatches 1",
        ),
        (["--mesh", "data=4"], "--mesh 'data=4' is data 4 x fsdp 1 x tensor 1 = 4 devices, but"),
        (["--parallel", "tpu"], "--parallel 'tpu': choose one of auto, jit, pmap, mesh"),
    ],
)
def test_jaxppo_train_checks_first(nothing_loaded, args, words, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "b" / "checkpoints" / "0").mkdir(parents=True)
    (tmp_path / "b" / "config.json").write_text('{"seed": 7, "prompt_length": 9, "eos": 3}')
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    own = [] if {"--parallel", "--mesh"} & {*args} else ["--parallel", "jit"]
    with pytest.raises(SystemExit) as stop:
        own += ["--data", str(tmp_path / "p.jsonl"), "--runs", str(tmp_path), *args]
        cli.script(train, TrainOptions, args=own)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


OPTIONS = TaskConfig(task="spelling", lora=0, batch_size=32, minibatches=4, parallel="pmap")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sft_batch_size": 12},  # 12 = 8 + 4
            "--sft-batch-size 12 does not divide into 8 devices; use 16",
        ),
        ({"sft_steps": -1}, "--sft-steps must be 0 or more, but is -1"),
        ({"batch_size": 8}, "--batch-size 8 does not divide into 8 devices x 4 minibatches"),
        ({"advantage": "rloo"}, "--advantage rloo compares the responses to a prompt"),
    ],
)
def test_the_option_of_the_stage_is_named(nothing_loaded, changes, words, tmp_path):
    options = replace(OPTIONS, runs=str(tmp_path))
    with pytest.raises(UserError) as caught:
        stages.run(replace(options, **changes))
    assert words in str(caught.value)
    stages.check(options)  # without them it could begin


def test_steps_per_call_are_those_of_the_policy_optimisation():
    """The supervised stage of 30 steps saves every 3: no multiple of 4."""
    options = TaskConfig(steps=8, save_every=8, eval_every=8, steps_per_call=4, sft_steps=30)
    own = stages.supervised_settings(stages.Path("nowhere"), options.sft_steps)
    start.validate_run(replace(options, **own))


def test_a_supervised_run_is_one_update_a_step():
    with pytest.raises(UserError, match="--epochs 1 --minibatches 1"):
        start.check_run(TaskConfig(parallel="jit", epochs=2), supervised=True)
