"""The scripts, at smoke size, as a user calls them."""

import json
import re
from pathlib import Path

import pytest
from runs import run_script as run
from runs import run_train, two_prompts

from jaxppo import pretrained, train
from jaxppo.pretrained.tiny import tiny_model
from jaxppo.run import files

pytestmark = pytest.mark.ci

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


SLOWER = [["--lora", "0", "--dtype", "float32"], ["--reward", "vader"]]


@pytest.mark.parametrize(
    "options", [[], *(pytest.param(options, marks=pytest.mark.slow) for options in SLOWER)]
)
def test_sentiment_writes_its_files(tmp_path, options, capsys, curves):
    run("sentiment", "--tiny", "--steps", "2", "--runs", str(tmp_path), "--name", "a", *options)
    folder = tmp_path / "a"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert "validation_kl" in metrics[-1]
    assert json.loads((folder / "config.json").read_text())["steps"] == 2
    result = json.loads((folder / "result.json").read_text())
    assert abs(result["gain"] - (result["sentiment_after"] - result["sentiment_before"])) < 1e-9
    samples = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and {"prompt", "before", "after"} <= set(samples[0])
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert any((folder / "checkpoints").iterdir())
    printed = capsys.readouterr().out
    assert "held-out sentiment" in printed and str(folder / "curves.png") in printed.replace(
        "\n", ""
    )
    assert (
        len(re.findall(r"^step \d/2  reward", printed, re.M)) == 2
    )  # one plain line a step without a terminal


def test_custom_loss(capsys):
    run("custom_loss", "--steps", "2", "--batch-size", "8", "--response-length", "3")
    assert re.findall(
        r"^(band|clip): step +2, [.\d]+ of tokens right", capsys.readouterr().out, re.M
    ) == ["band", "clip"]
    with pytest.raises(SystemExit) as stop:
        run("custom_loss", "--algorithm", "nonsense")
    assert stop.value.code == 2 and "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--batch-size", "63"],
            "--batch-size 63 does not divide into 4 minibatches; use --batch-size 64",
        ),
        (["--loss", "nonsense"], "unknown loss 'nonsense': choose one of reinforce, clip"),
        (["--stepz", "3"], "no option --stepz; perhaps you meant --steps"),
        (["--name", "../up"], "use 1 to 64 letters"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run("sentiment", "--tiny", "--runs", str(tmp_path), *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


KINDS = [
    ("words", "gru"),
    *(
        pytest.param("bpe", kind, marks=pytest.mark.slow)
        for kind in ("transformer", "lstm", "window")
    ),
]


@pytest.mark.parametrize(("tokens", "kind"), KINDS)
def test_pretraining_writes_a_checkpoint(tmp_path, capsys, tokens, kind):
    data = tmp_path / "texts.jsonl"
    data.write_text(
        "".join(
            json.dumps({"text": f"the film number {i} was good, and so was number {i + 1}."}) + "\n"
            for i in range(60)
        )
    )
    small = [
        "--width",
        "32",
        "--layers",
        "1",
        "--max-vocab",
        "300",
        "--response-length",
        "15",
        "--batch-size",
        "8",
    ]
    options = [
        "--data",
        str(data),
        "--runs",
        str(tmp_path),
        "--eval-every",
        "2",
        "--tokens",
        tokens,
        "--repeat",
        "2",
        "--model-kind",
        kind,
    ]
    options += small
    run("pretrain", *options, "--steps", "4", "--results", str(tmp_path / "results"))
    record = json.loads((tmp_path / "results" / "pretrain" / "pretrain.json").read_text())
    assert (
        record["config"]["model"] == ""
        and record["config"]["tokens"] == tokens
        and record["result"]["held_out_texts"] > 0
    )
    assert "held-out perplexity" in capsys.readouterr().out
    model = pretrained.load(tmp_path / "pretrain" / "model")
    assert (
        model.config.width == 32 and model.config.kind == kind and model.tokenizer.vocab_size <= 300
    )
    rows = files.read_jsonl(tmp_path / "pretrain" / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["validation_perplexity"] < 300


def test_pretraining_starts_texts_as_prompts_start(tmp_path, monkeypatch):
    """The end of text, 0, is also the start of a document; it is once between two texts."""
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"x{i}"}) + "\n" for i in range(60)))
    seen = []

    class Seen(Exception):
        pass

    def fit(config, policy, objective, rows, **named):
        seen.append((config.start, rows.tokens.reshape(-1)))
        raise Seen

    monkeypatch.setattr(train, "fit", fit)
    small = ["--tokens", "words", "--width", "8", "--layers", "1", "--response-length", "2"]
    for name, options in (("plain", []), ("start", ["--prompt-start"])):
        with pytest.raises(Seen):
            run(
                "pretrain",
                "--data",
                str(data),
                "--runs",
                str(tmp_path),
                "--name",
                name,
                *small,
                *options,
            )
    (plain, before), (start, after) = seen
    assert plain == () and before[0] != 0
    assert start == (0,) and after[0] == 0
    assert not ((after[1:] == 0) & (after[:-1] == 0)).any()


def test_fine_tuning_writes_a_checkpoint(tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    # half of them differ from others in case alone, and two are exact copies
    texts = [word.format(i) for i in range(20) for word in ("number {}", "NUMBER {}")]
    pairs = [{"prompt": text, "response": " is good"} for text in [*texts, *texts[:2]]]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    small = ["--steps", "4", "--eval-every", "2", "--batch-size", "8", "--buckets", "2"]
    run(
        "sft",
        "--tiny",
        "--data",
        str(data),
        "--runs",
        str(tmp_path),
        "--results",
        str(tmp_path / "results"),
        *small,
    )
    record = json.loads((tmp_path / "results" / "sft" / "sft.json").read_text())
    seen = [
        row
        for row in files.read_jsonl(tmp_path / "sft" / "metrics.jsonl")
        if "validation_perplexity" in row
    ]
    assert record["result"]["perplexity"] == min(row["validation_perplexity"] for row in seen)
    said = capsys.readouterr().out
    assert "held-out perplexity" in said
    assert "2 of 42 pairs are exact copies of others and were left out" in said
    tuned, start = pretrained.load(tmp_path / "sft" / "model"), tiny_model(0)
    assert tuned.config == start[0]
    kernel = lambda params: params["layers_0"]["attention"]["q"]["kernel"]
    assert (
        0 < abs(kernel(tuned.params) - kernel(start[1])).max() < 0.1
    )  # merged adapters, and rounding to bfloat16


@pytest.mark.parametrize("dpo", [[], pytest.param(["--dpo"], marks=pytest.mark.slow)])
def test_reward_model_on_pairs(tmp_path, capsys, dpo):
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "".join(json.dumps({"better": f"good {i}", "worse": f"bad {i}"}) + "\n" for i in range(60))
    )
    small = ["--response-length", "11", "--batch-size", "8", "--lora", "0", "--lr", "1e-2"]
    small += ["--steps", "8", "--eval-every", "4", "--results", str(tmp_path / "results")]
    run("reward_model", "--tiny", "--data", str(data), "--runs", str(tmp_path), *small, *dpo)
    found = re.search(r"test pairs: accuracy ([\d.]+)", capsys.readouterr().out)
    assert found and float(found[1]) == 1.0
    stored = json.loads((tmp_path / "reward_model" / "result.json").read_text())
    assert stored["test_accuracy"] == 1.0 and stored["test_pairs"] == 8
    name = "dpo/reward_model" if dpo else "reward_model/reward_model"
    assert json.loads((tmp_path / "results" / f"{name}.json").read_text())["result"] == stored
    assert (tmp_path / "reward_model" / "model").exists() == bool(dpo)
    prompts = two_prompts(tmp_path)
    policy = ["--tiny", "--steps", "1", "--data", str(prompts), "--runs", str(tmp_path)]
    policy += ["--reward-model", str(tmp_path / "reward_model")]
    policy += [
        "--response-length",
        "4",
        "--batch-size",
        "32",
        "--minibatches",
        "4",
        "--lora",
        "0",
        "--dtype",
        "float32",
    ]
    if dpo:  # it has no value head
        with pytest.raises(SystemExit) as stop:
            run_train(*policy, "--name", "b")
        assert stop.value.code == 2 and "that run has no value head" in capsys.readouterr().err
        return
    run_train(*policy, "--name", "b", "--algorithm", "n_plus_tldr", "--prompt-length", "8")
    row = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["step"] == 1 and row["invalid_rows"] == 0 and row["reward"] != 0


def test_reward_model_on_labels(tmp_path, capsys):
    data = tmp_path / "labels.jsonl"
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": i % 2} for i in range(120)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [
        "--response-length",
        "11",
        "--batch-size",
        "8",
        "--lora",
        "0",
        "--lr",
        "1e-2",
        "--labels",
    ]
    run(
        "reward_model",
        "--tiny",
        "--data",
        str(data),
        "--runs",
        str(tmp_path),
        "--steps",
        "10",
        "--eval-every",
        "5",
        *small,
    )
    found = re.search(r"test texts: accuracy ([\d.]+)", capsys.readouterr().out)
    assert found and float(found[1]) == 1.0
    data.write_text('{"text": "good", "label": 2}\n')
    with pytest.raises(SystemExit) as stop:
        run(
            "reward_model",
            "--tiny",
            "--data",
            str(data),
            "--runs",
            str(tmp_path),
            "--name",
            "b",
            *small,
        )
    assert stop.value.code == 2
    assert (
        "labels.jsonl, line 1: label is 2, but must be a probability between 0 and 1"
        in capsys.readouterr().err
    )
