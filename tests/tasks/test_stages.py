"""The stages of a task at the smallest size: killed, resumed, and measured again."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest

from jaxppo import commands, pretrained, tasks
from jaxppo.data.examples import Example, Examples
from jaxppo.errors import UserError
from jaxppo.rewards import text
from jaxppo.run import files
from jaxppo.tasks import TaskConfig, measure, stages

pytestmark = pytest.mark.ci
pytest.importorskip("jiwer", reason="error rates need the extra `tasks`")


def options(folder, **changes) -> TaskConfig:
    data = folder / "x.jsonl"
    if not data.exists():
        data.write_text(
            "".join(
                json.dumps({"prompt": f"copy {i}", "reference": str(i)}) + "\n" for i in range(300)
            )
        )
    base = {
        "task": "spelling",
        "name": "a",
        "runs": str(folder / "runs"),
        "data": str(data),
        "tiny": True,
        "parallel": "jit",
    }
    sizes = {
        "steps": 2,
        "group_size": 2,
        "advantage": "rloo",
        "value_loss": "none",
        "eval_every": 1,
        "eval_samples": 2,
        "save_every": 1,
    }
    return TaskConfig(**base | sizes | changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return folder, stages.run(options(folder, results=str(folder / "results")))


def test_files_and_results(done):
    folder, found = done
    root = folder / "runs" / "a"
    assert {path.name for path in root.iterdir()} == {
        "start",
        "supervised",
        "policy",
        "examples.sha256",
        "result.json",
        "outputs.jsonl",
    }
    stored = json.loads((root / "result.json").read_text())
    record = json.loads((folder / "results" / "spelling" / "a.json").read_text())
    assert (
        record == {name: x for name, x in stored.items() if name != "samples"}
        and "runs" not in record["config"]
    )
    assert stored["test_rows"] == 8 and stored["seed"] == 0 and stored["best_step"] in (1, 2)
    assert stored["gain"].keys() == {"exact", "cer", "sampled_exact"}
    assert stored["policy"]["score"] == stored["policy"]["sampled_exact"]
    for metric in stored["gain"]:
        before, after, (gain, low, high) = (
            stored["supervised"][metric],
            stored["policy"][metric],
            stored["gain"][metric],
        )
        assert gain == pytest.approx(after - before) and low <= gain <= high
    for row in files.read_jsonl(root / "policy" / "metrics.jsonl"):
        assert row["validation_pass@1"] <= row["validation_pass@2"] and "validation_avg@2" in row
    curve = stored["curve"]
    assert len(curve["reward"]) == len(curve["kl"]) == 2
    best = stored["best_step"]
    assert [step for step, _ in curve["validation"]] == [1, 2]
    assert curve["validation"][best - 1][1] == max(score for _, score in curve["validation"])
    outputs = files.read_jsonl(root / "outputs.jsonl")
    assert (
        len(outputs) == 8
        and outputs[0]["prompt"].startswith("copy ")
        and outputs[0]["prompt"].endswith("\n=")
    )
    sampled = [row["policy_sample"] == row["reference"] for row in outputs]
    assert stored["policy"]["sampled_exact"] == sum(sampled) / 8
    start, tuned, last = (
        pretrained.load(root / name).params
        for name in ("start", "supervised/model", "policy/model")
    )
    kernel = lambda params: params["layers_0"]["attention"]["q"]["kernel"]
    assert (kernel(start) != kernel(tuned)).any() and (kernel(tuned) != kernel(last)).any()


@pytest.mark.parametrize("most, demonstrations", [(0, 20), (5, 5), (50, 20)])
def test_the_supervised_stage_sees_some_of_the_examples(
    tmp_path, monkeypatch, most, demonstrations
):
    seen = {}
    monkeypatch.setattr(stages, "initial_checkpoint", lambda *args: None)
    monkeypatch.setattr(stages, "check_policy_stage", lambda *args: None)
    monkeypatch.setattr(stages, "_supervised_rows", lambda settings, policy, task, part: len(part))
    monkeypatch.setattr(
        stages, "train_supervised", lambda *args: seen.update(rows=args[-1](None, None))
    )
    examples = Examples([Example("a", "b")] * 20, [Example("c", "d")] * 9, [])
    settings = options(tmp_path, sft_examples=most, test_rows=8)
    stages.train_baseline(settings, tasks.TASKS["spelling"], examples, tmp_path)
    assert seen == {"rows": (demonstrations, 8)}


def test_the_policy_stage_sees_some_of_the_examples(done, monkeypatch):
    folder, _ = done
    seen = []

    def stop(settings, policy, reward, prompts, **rest):
        seen.append(len(prompts.tokens))
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train_and_measure", stop)
    model = str(folder / "runs" / "a" / "supervised" / "model")
    settings = options(folder, name="some", sft_steps=0, model=model, lora=0, policy_examples=24)
    settings = dataclasses.replace(settings, tiny=False, prompt_length=16, response_length=8)
    with pytest.raises(KeyboardInterrupt):
        stages.run(settings)
    assert seen == [24]


def test_an_existing_name_is_refused_and_resume_runs_nothing_twice(done, capsys):
    folder, found = done
    with pytest.raises(
        UserError, match="exists: choose another --name, or continue it with --resume"
    ):
        stages.run(options(folder))
    before = (folder / "runs" / "a" / "policy" / "metrics.jsonl").read_text()
    again = stages.run(options(folder, resume=True))
    assert (folder / "runs" / "a" / "policy" / "metrics.jsonl").read_text() == before
    assert again["policy"] == found["policy"] and again["gain"] == found["gain"]


def test_without_a_supervised_stage_the_policy_starts_from_the_model(done):
    """The start is measured as the model that the options name, before any training."""
    folder, found = done
    model = str(folder / "runs" / "a" / "supervised" / "model")
    sizes = {"prompt_length": 48, "response_length": 12, "batch_size": 8, "minibatches": 1}
    own = {"name": "alone", "sft_steps": 0, "model": model, "tiny": False, "lora": 0}
    alone = stages.run(options(folder, **own, **sizes, test_rows=8))
    root = folder / "runs" / "alone"
    assert not (root / "supervised").exists() and not (root / "start").exists()
    assert "supervised" not in alone and set(alone["minutes"]) == {"policy"}
    assert alone["start"] == found["supervised"] and alone["best_step"] in (1, 2)
    assert files.read_jsonl(root / "outputs.jsonl")[0].keys() >= {"start", "policy"}


@pytest.mark.parametrize("name", ["..", ".", "a/b", ""])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="use 1 to 64 letters"):
        stages.check(options(tmp_path, name=name, resume=True))


@pytest.mark.parametrize("lost", [["policy"], ["policy/model", "policy/checkpoints/2"]])
def test_killed_between_and_within_the_stages(done, lost):
    """Resumed without the second stage, and after one step of it, it ends the same."""
    folder, found = done
    for part in (*lost, "result.json", "outputs.jsonl"):
        path = folder / "runs" / "a" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = stages.run(options(folder, resume=True))
    assert again["policy"] == found["policy"] and again["best_step"] == found["best_step"]
    assert (folder / "runs" / "a" / "result.json").exists()


def test_a_resumed_run_keeps_its_prompt_format(done):
    folder, _ = done
    words = "--prompt-format {prompt}\n= -> Q {prompt}"
    with pytest.raises(UserError, match=re.escape(words)):
        stages.run(options(folder, resume=True, prompt_format="Q {prompt}"))


def test_a_resumed_run_keeps_its_examples(tmp_path):
    """A test example may otherwise come from the training part of the first stage."""
    a, b = [Example("a", "1")], [Example("b", "2")]
    check = lambda *parts, **changes: stages.check_same_examples(
        options(tmp_path, **changes), Examples(*parts), tmp_path / "runs"
    )
    check(a, a, b)
    check(a, a, b)
    with pytest.raises(UserError, match="the data are not those that this run began with"):
        check(a, b, a)
    check(a, b, a, data_changed="ok")


def test_what_the_policy_stage_would_refuse_is_found_before_the_supervised_one(
    tmp_path, monkeypatch
):
    small = {"tiny": False, "tokens": "bytes", "width": 16, "layers": 1, "lora": 0}
    short = options(tmp_path, **small, prompt_start=True, prompt_length=1)
    with pytest.raises(UserError, match="a prompt length of 1 leaves no room"):
        stages.run(short)

    def refuse(config, tokenizer):
        raise UserError(f"another tokenizer than {tokenizer.vocab_size} bytes")

    monkeypatch.setattr(stages.load, "load_reward_model", refuse)
    monkeypatch.setattr(stages.rewards, "reward_name", lambda options: "model")
    with pytest.raises(UserError, match="another tokenizer than 2.. bytes"):
        stages.run(options(tmp_path, **small, name="b", reward="model"))
    assert not [*tmp_path.rglob("metrics.jsonl")]


def test_the_runs_own_data_by_any_path_are_its_test_part(done, monkeypatch):
    folder, _ = done
    monkeypatch.chdir(folder)
    own = lambda data: measure.evaluate_run(folder / "runs" / "a", "spelling", rows=300, data=data)
    assert own("x.jsonl")["test_rows"] == own("../" + folder.name + "/x.jsonl")["test_rows"] < 60


def test_evaluate_run(done):
    folder, found = done
    again = measure.evaluate_run(
        folder / "runs" / "a", "spelling", rows=8, samples=4, data=str(folder / "x.jsonl")
    )
    value, low, high = again["exact"]
    assert low <= value <= high
    assert again["pass@1"] <= again["pass@2"] <= again["pass@4"]
    assert len(again["outputs"]) == 8
    with pytest.raises(
        UserError, match="--samples counts right responses, but translation is measured by bleu"
    ):
        measure.evaluate_run(
            folder / "runs" / "a", "translation", rows=8, samples=4, data=str(folder / "x.jsonl")
        )
    with pytest.raises(UserError, match="no run in"):
        measure.evaluate_run(folder / "runs", "spelling", rows=8)


def test_outer_spaces_do_not_count_in_pass_at_k(done, monkeypatch):
    """One of two samples is right for each of eight references."""
    folder, _ = done
    data = folder / "spaces.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}", "reference": " b"}}\n' for i in range(50)))
    drawn = lambda self, state, prompts, *, seed: (
        [SimpleNamespace(prompt="", response="b " if seed == 1 else "wrong")] * 8
    )
    monkeypatch.setattr(measure.Sampler, "__call__", drawn)
    found = measure.evaluate_run(
        folder / "runs" / "a", "spelling", rows=8, samples=2, data=str(data)
    )
    assert (found["pass@1"], found["pass@2"]) == (0.5, 1.0)


def test_a_reward_of_the_whole_batch_needs_a_mesh(tmp_path, monkeypatch):
    def accept(*args):
        raise AssertionError("accepted")

    monkeypatch.setattr(stages.load, "use_compilation_cache", accept)
    wanted = "each of 8 devices sees its own under pmap; add --mesh data=8"
    alone = {"group_size": 1, "advantage": "gae"}
    with pytest.raises(UserError, match=wanted):
        stages.run(options(tmp_path, parallel="auto", **alone), whole_batch=True)
    for changes in ({"parallel": "jit"}, {"parallel": "auto", "mesh": "data=8"}):
        with pytest.raises(AssertionError, match="accepted"):
            stages.run(options(tmp_path, **alone, **changes), whole_batch=True)


def test_adapters_on_a_new_network_are_refused(tmp_path):
    with pytest.raises(UserError, match="adapters would leave its weights random; add --lora 0"):
        stages.check(options(tmp_path, tiny=False, lora=8))


def test_a_run_is_evaluated_on_its_own_data_and_prompts(done):
    """Without --data on the run's data; one task of several has its name before the prompt."""
    folder, found = done
    again = measure.evaluate_run(folder / "runs" / "a", "spelling", rows=8)
    assert again["cer"][0] == pytest.approx(found["policy"]["cer"])
    assert again["step"] == found["best_step"]
    config = folder / "runs" / "a" / "policy" / "config.json"
    kept = config.read_text()
    config.write_text(json.dumps(json.loads(kept) | {"prompt_format": "Q {prompt}"}))
    own = measure.evaluate_run(folder / "runs" / "a", "spelling", rows=8)
    config.write_text(kept)
    assert own["outputs"][0]["prompt"].startswith("Q copy ")
    several = folder / "several"
    shutil.copytree(folder / "runs" / "a", several)
    config = several / "policy" / "config.json"
    stored = json.loads(config.read_text()) | {"tasks": ["sums", "spelling"], "task": "multitask"}
    config.write_text(json.dumps(stored))
    outputs = measure.evaluate_run(several, "spelling", rows=8)["outputs"]
    assert outputs[0]["prompt"].startswith("spelling: copy ") and outputs[0]["prompt"].endswith(
        "\n="
    )
    with pytest.raises(
        UserError, match="was trained on several tasks; measure one of them, sums, spelling"
    ):
        measure.evaluate_run(several, "multitask", rows=8)


def test_wrong_names_are_refused_before_training(tmp_path):
    for changes, words in (
        ({"loss": "gpso"}, "gpso"),
        ({"reward": "blue"}, "blue"),
        ({"advantage": "x"}, "x"),
    ):
        with pytest.raises(UserError, match=words):
            stages.run(options(tmp_path, **changes))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("reward", ["vader", "text_wer"])
def test_a_missing_package_is_found_before_training(tmp_path, monkeypatch, reward):
    def missing(name, extra="tasks"):
        raise UserError(f"{name} is not installed")

    monkeypatch.setattr(text, "import_extra", missing)
    with pytest.raises(UserError, match="is not installed"):
        stages.run(options(tmp_path, reward=reward))
    assert not (tmp_path / "runs").exists()


def test_the_command_eval(done, capsys, monkeypatch):
    folder, found = done
    root = folder / "runs" / "a"
    arguments = [
        "jaxppo",
        "eval",
        str(root),
        "--task",
        "spelling",
        "--rows",
        "8",
        "--data",
        str(folder / "x.jsonl"),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    commands.main()
    printed = capsys.readouterr().out
    assert (
        "exact: 0.000 (95 % interval 0.000 to 0.000 over 8 examples)" in printed
        and "cer: " in printed
    )
    stored = json.loads((root / "eval.json").read_text())
    assert stored["cer"][0] == pytest.approx(found["policy"]["cer"]) and stored["test_rows"] == 8
    assert len(files.read_jsonl(root / "eval.jsonl")) == 8
    monkeypatch.setattr("sys.argv", [*arguments[:2], str(folder / "nowhere"), *arguments[3:]])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 2 and "no run in" in capsys.readouterr().err
