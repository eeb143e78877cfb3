"""`jaxppo train`, as a user calls it."""

import json
import textwrap

import pytest
from runs import run_train, two_prompts

from jaxppo.commands import report, train
from jaxppo.errors import UserError


def mine(folder, text):
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_function_of_a_file(tmp_path):
    path = mine(tmp_path, "def reward(prompt, response):\n    return 3.0\n")
    assert train.load_function(f"{path}:reward")("", "") == 3.0


def test_a_file_is_run_once(tmp_path):
    path = mine(tmp_path, "def one(prompt, response): ...\ndef two(prompt, response): ...\n")
    one, two = (train.load_function(f"{path}:{name}") for name in ("one", "two"))
    assert one.__globals__ is two.__globals__


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine.py", "give FILE.py:FUNCTION"),
        ("mine.py:", "give FILE.py:FUNCTION"),
        ("{folder}/none.py:reward", "there is no file"),
        ("{folder}/mine.py:absent", "has no function absent"),
        ("{folder}/mine.py:number", "has no function number"),
        ("{folder}/broken.py:reward", "cannot be run (ZeroDivisionError: division by zero)"),
        ("{folder}/leaves.py:reward", "cannot be run (SystemExit: 0)"),
    ],
)
def test_a_function_that_cannot_be_loaded(tmp_path, name, words):
    mine(tmp_path, "number = 3\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError) as error:
        train.load_function(name.format(folder=tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.ci
def test_two_rewards_and_a_column(tmp_path, capsys):
    path = mine(
        tmp_path,
        """
        def right(prompt, response, answer):
            assert answer == prompt[-1]  # the row's own column
            return 1.0

        def longer(prompt, response):
            return len(response)
        """,
    )
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"ab{x}", "answer": x}) + "\n" for x in "xyz"))
    options = ["--data", str(data), "--runs", str(tmp_path), "--tiny", "--steps", "1"]
    options += ["--batch-size", "4", "--response-length", "3"]
    rewards = ["--reward", f"{path}:right", f"{path}:longer", "--weights", "longer", "2"]
    only = ["--reward", f"{path}:longer", "--weights", "longer", "2", "--name", "only"]
    run_train(*options, *only)
    row = json.loads((tmp_path / "only" / "metrics.jsonl").read_text())
    assert row["reward"] == pytest.approx(2 * row["score_longer"])
    run_train(*options, *rewards, "--resume")  # begins a run that has not begun
    row = json.loads((tmp_path / "train" / "metrics.jsonl").read_text())
    assert row["score_right"] == 1 and row["score_longer"] > 0
    assert row["reward"] == pytest.approx(1 + 2 * row["score_longer"])
    assert row["invalid_rows"] == 0
    with pytest.raises(SystemExit) as stop:
        run_train(*options[2:], *rewards)
    assert stop.value.code == 2 and "--data is missing" in capsys.readouterr().err


@pytest.mark.ci
def test_several_samples_of_each_validation_prompt(tmp_path, capsys):
    """They are in metrics.jsonl, the curves and the report; without validation prompts they are
    refused. A score of .5 or more is right.
    """
    path = mine(tmp_path, "def reward(prompt, response):\n    return len(response) % 2 / 2\n")
    data = two_prompts(tmp_path)
    options = ["--tiny", "--steps", "2", "--batch-size", "4", "--response-length", "3"]
    options += ["--data", str(data), "--reward", f"{path}:reward", "--runs", str(tmp_path)]
    options += ["--eval-every", "2", "--eval-samples", "4", "--eval-right", "0.5"]
    with pytest.raises(SystemExit) as stop:
        run_train(*options)
    assert stop.value.code == 2 and "--eval-samples 4 needs validation" in capsys.readouterr().err
    run_train(*options, "--validation", str(data))
    row = json.loads((tmp_path / "train" / "metrics.jsonl").read_text().splitlines()[-1])
    names = ["avg@4", "maj@4", "pass@4", "pass@2", "pass@1"]
    assert [name for name in row if "@" in name] == [f"validation_{name}" for name in names]
    assert row["validation_avg@4"] == row["validation_reward"] == row["validation_pass@1"] / 2
    assert row["validation_pass@1"] <= row["validation_pass@2"] <= row["validation_pass@4"]
    report.write([tmp_path / "train"], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "avg@4 (score a response)" in page
    assert all(f"{name} (share of prompts)" in page for name in names[1:])


@pytest.mark.ci
def test_a_second_run_of_the_same_name_needs_resume(tmp_path, capsys):
    data = two_prompts(tmp_path)
    options = [
        "--tiny",
        "--batch-size",
        "4",
        "--data",
        str(data),
        "--runs",
        str(tmp_path),
        "--name",
        "b",
        "--save-every",
        "1",
    ]
    run_train(*options, "--steps", "1")
    with pytest.raises(SystemExit) as stop:
        run_train(*options, "--steps", "1")
    assert stop.value.code == 2
    assert "exists: choose another --name, or continue it with --resume" in capsys.readouterr().err
    run_train(*options, "--steps", "2", "--resume")
    rows = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


BAD_DATA = [  # (second line of a file of prompts, message)
    (b'{"prompt": NaN}', "line 2: a number that is NaN"),
    (b'{"prompt": "\\ud800"}', "line 2: half of a surrogate pair"),
    (b'{"prompt": ' + b"[" * 100_000, "line 2: nested too deeply"),
    (b'{"prompt": ' + b"1" * 5000 + b"}", "line 2: a number that is NaN, infinite, beyond float64"),
    (b'{"prompt": "a", "prompt": "b"}', "line 2: the key 'prompt' twice"),
    (b'{"text": "a"}', "line 2: "),
    (b'{"prompt": 3}', "line 2: "),
    (b'{"prompt": " "}', "line 2: "),
    (b'{"prompt": "' + b"a" * 2**21 + b'"}', "line 2: "),
    (b"\xff", "line 2: not UTF-8"),
]


@pytest.mark.ci
@pytest.mark.parametrize(("line", "message"), BAD_DATA)
def test_bad_data_is_one_line_and_nothing_is_written(tmp_path, line, message, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_bytes(b'{"prompt": "The film"}\n' + line + b"\n")
    with pytest.raises(SystemExit) as stop:
        run_train("--tiny", "--data", str(data), "--runs", str(tmp_path / "runs"))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in error and "\n" not in error and len(error) < 500
    assert not (tmp_path / "runs").exists()


@pytest.mark.ci
@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (b"", [], "no objects"),
        (
            b'{"prompt": "Far too long a beginning"}\n',
            ["--prompt-length", "4"],
            "none of 1 prompts fits in 4 tokens",
        ),
        (
            b'{"prompt": "Far too long"}\n',
            ["--prompt-length", "4", "--too-long", "error"],
            "prompt 0 has 12 tokens, but 4 fit",
        ),
        (
            b'{"prompt": "a"}\n' + b"{\n" * 3,
            ["--bad-lines", "skip", "--max-bad-lines", "2"],
            "that is bad line 3, and 2 may",
        ),
    ],
)
def test_data_without_usable_prompts(tmp_path, data, options, words, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        run_train("--tiny", "--data", str(path), "--runs", str(tmp_path / "runs"), *options)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and "\n" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.ci
@pytest.mark.parametrize(
    "options",
    [
        ["--algorithm", "dapo", "--batch-size", "32"],
        pytest.param(["--algorithm", "nlpo", "--critic", "separate"], marks=pytest.mark.slow),
    ],
)
def test_algorithm_by_name(tmp_path, options):
    data = two_prompts(tmp_path)
    small = [
        "--tiny",
        "--steps",
        "1",
        "--response-length",
        "4",
        "--data",
        str(data),
        "--runs",
        str(tmp_path),
        "--name",
        "c",
    ]
    run_train(*small, *options)
    stored = json.loads((tmp_path / "c" / "config.json").read_text())
    assert stored["algorithm"] == options[1]
    assert stored["value_loss"] == ("none" if options[1] == "dapo" else "mse")
