"""experiments/classify.py at smoke size, as a user calls it."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from runs import run_script as run

from jaxppo import commands
from jaxppo.models import text_classifier
from jaxppo.rewards import classifier
from jaxppo.run import checkpoint, files

pytestmark = pytest.mark.ci

SMALL = [
    "--features",
    "8",
    "--width",
    "8",
    "--batch-size",
    "16",
    "--response-length",
    "8",
    "--lr",
    "1e-2",
    "--dropout",
    "0",
]
EVERY = ["--eval-every", "18", "--save-every", "18"]  # an epoch: about 288 texts, 16 a batch


def written(path, rows=360):
    """Write texts in which one word tells the label, and a copy of each in capitals."""
    rng = np.random.default_rng(0)
    kinds = {"good": "fine", "bad": "poor", "odd": "queer"}
    lines = []
    for number in range(rows):
        label = list(kinds)[number % 3]
        text = f"{kinds[label]} {' '.join(f'word{k}' for k in rng.integers(0, 30, 4))}"
        lines += [{"text": text, "label": label}] * 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_three_classes_are_learned(tmp_path, capsys):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("fine 1 0 1 0 1 0 1 0\npoor 0 1 0 1 0 1 0 1\n")
    data = written(tmp_path / "texts.jsonl")
    options = [
        "--data",
        str(data),
        "--runs",
        str(tmp_path),
        "--vectors",
        str(vectors),
        "--steps",
        "216",
        "--patience",
        "3",
    ]
    run("classify", *options, *SMALL, *EVERY)
    printed = capsys.readouterr().out
    folder = tmp_path / "classify"
    result = json.loads((folder / "result.json").read_text())
    assert result["test_accuracy"] > 0.95 and result["labels"] == ["bad", "good", "odd"]
    assert "word vectors: 2 of 35 words" in printed  # 33 words, the end and the unknown word
    counts = re.search(
        r"(\d+) texts for training, (\d+) for validation, (\d+) for the test", printed
    )
    assert counts and sum(map(int, counts.groups())) == 360  # without the copies
    assert "360 of 720 labelled texts are exact copies of others and were left out" in printed
    rows = files.read_jsonl(folder / "metrics.jsonl")
    assert len(re.findall(r"^step \d+/216  loss", printed, re.M)) == len(
        rows
    )  # one plain line a step without a terminal
    seen = {row["step"]: row["validation_accuracy"] for row in rows if "validation_accuracy" in row}
    assert list(seen) == list(range(18, rows[-1]["step"] + 1, 18))
    assert seen[result["step"]] == result["validation_accuracy"] == max(seen.values())
    assert len(rows) == min(
        216, max(seen, key=seen.__getitem__) + 3 * 18
    )  # stopped after three evaluations without improvement
    net = text_classifier.Classifier(8, layers=("convolution", "pool", "gru"), classes=3)
    like = classifier.as_model(net, vocab_size=35, width=8).init(jax.random.key(0))
    best = checkpoint.load_tree(folder / "best", like)
    assert (
        np.abs(best["embedding"]).max() > 0
        and (best["net"]["out"]["kernel"] != like["net"]["out"]["kernel"]).any()
    )


def test_a_resumed_run_equals_a_whole_one_and_writes_a_record(tmp_path, capsys, monkeypatch):
    data = written(tmp_path / "texts.jsonl")
    options = [
        "--tiny",
        "--data",
        str(data),
        "--runs",
        str(tmp_path),
        "--results",
        str(tmp_path / "results"),
    ]
    options += ["--eval-every", "2", "--save-every", "2", "--lr-schedule", "constant"]
    run("classify", *options, "--name", "whole", "--steps", "4")
    run("classify", *options, "--name", "parts", "--steps", "2")
    run("classify", *options, "--name", "parts", "--steps", "4", "--resume")
    whole, parts = (
        files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")
    )
    assert [row["loss"] for row in whole] == [row["loss"] for row in parts] and len(whole) == 4
    records = [
        json.loads((tmp_path / "results" / "classify" / f"{name}.json").read_text())
        for name in ("whole", "parts")
    ]
    with pytest.raises(SystemExit) as stop:
        monkeypatch.setattr(sys, "argv", ["jaxppo", "sample", str(tmp_path / "whole"), "a prompt"])
        commands.main()
    assert stop.value.code == 2 and "whole is a text classifier" in capsys.readouterr().err
    assert records[0]["result"] == records[1]["result"] and records[0]["config"]["layers"] == [
        "convolution",
        "pool",
        "gru",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, 'line 1: "label" must be a string or an integer'),
        ({"text": "a", "label": "x"}, "has only one label, 'x'; give at least two"),
    ],
)
def test_bad_labels_are_refused(tmp_path, capsys, line, message):
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps(line) + "\n")
    with pytest.raises(SystemExit) as stop:
        run("classify", "--data", str(data), "--runs", str(tmp_path), *SMALL)
    assert stop.value.code == 2 and message in capsys.readouterr().err
