"""The blocks of README.md and of the pages in docs/: Python runs with a tiny model, commands have
valid options.

`follow_readme.py` runs the commands themselves.
"""

import ast
import json
import runpy
import shlex
import sys
from pathlib import Path

import follow_readme
import numpy as np
import pages_run
import pytest

from jaxppo import cli, commands, launch
from jaxppo.cli import parse
from jaxppo.data import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = follow_readme.read_pages()
LINES = follow_readme.commands(PAGES, cloud=False)


# --- Python ---


def test_the_readme_is_a_front_page():
    assert len(README.split()) <= 1500 and len(README.splitlines()) <= 250


@pytest.mark.ci
def test_the_python_of_the_readme(tmp_path, monkeypatch):
    """The six lines for one's own task, and the swapped loss."""
    blocks = pages_run.python_blocks(README)
    own = ast.parse(blocks[0]).body
    (reward,) = [x for x in own if isinstance(x, ast.FunctionDef)]
    assert len(blocks) == 2 and len(own) + len(reward.body) == 6
    found = pages_run.run_page(README, tmp_path, monkeypatch)
    run = found["run"]
    assert run.folder == Path("runs/my-loss") and (tmp_path / "runs" / "policy").is_dir()
    assert run.config.algorithm == "grpo" and run.metrics["reward"].shape == (2,)
    # Only the swapped loss logs this; nothing is updated before the first minibatch.
    np.testing.assert_allclose(run.metrics["mean_ratio"], 1, atol=1e-3)


@pytest.mark.ci
def test_the_swapped_parts_make_a_step(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    assert len(pages_run.python_blocks(text)) == 8
    found = pages_run.run_page(text, tmp_path, monkeypatch)
    metrics = {name: float(x) for name, x in found["metrics"].items()}
    assert int(found["state"].step) == 1 and metrics["skipped"] == 0 and metrics["grad_norm"] > 0
    # The reward is that of the swapped block, not count_token's.
    assert -found["config"].response_length < metrics["reward"] <= 0
    assert metrics["mean_ratio"] > 0.5  # the loss's diagnostics are metrics


WITH_PYTHON = [
    path
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if path.name != "parts.md" and pages_run.python_blocks(path.read_text(encoding="utf-8"))
]


@pytest.mark.ci
@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.stem)
def test_the_python_of_a_page(path, tmp_path, monkeypatch):
    pages_run.run_page(path.read_text(encoding="utf-8"), tmp_path, monkeypatch)


def test_pages_with_python_are_found():
    assert {path.name for path in WITH_PYTHON} >= {"your_task.md"}


def test_files_that_a_page_shows(tmp_path):
    files = follow_readme.shown_files(PAGES)
    assert {"prompts.jsonl", "chats.jsonl", "mine.py"} <= files.keys()
    for name in ("prompts.jsonl", "chats.jsonl"):
        (tmp_path / name).write_text(files[name])
        rows = table.read_file(tmp_path / name)
        assert len(rows) == 2 and all(row.keys() == {"prompt", "answer"} for row in rows)
    (tmp_path / "mine.py").write_text(files["mine.py"])
    mine = runpy.run_path(str(tmp_path / "mine.py"))
    assert mine["reward"](**rows[0], response="5, I think") == 0
    assert mine["reward"](**rows[0], response="5 .") == 1


# --- Shell ---


def test_every_page_with_shell_blocks_is_followed():
    pages = {
        path.relative_to(ROOT).as_posix()
        for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        if follow_readme.shell_blocks(path.read_text(encoding="utf-8"))
    }
    assert pages <= set(follow_readme.PAGES)


def test_commands_of_a_text():
    text = (
        "a\n```sh\nls  # all\n# no\n\n  cat '#1'\n```\n```python\nx\n```\n    "
        "dir\n```sh cloud\npython tpu/tpu.py list\n```\n```python mine.py\ny\n```\n```sh\nls\n```\n"
    )
    assert follow_readme.commands(text) == ["ls", "cat '#1'", "python tpu/tpu.py list"]
    assert follow_readme.commands(text, cloud=False) == ["ls", "cat '#1'"]
    assert follow_readme.commands(text, cloud=True) == ["python tpu/tpu.py list"]
    assert follow_readme.shown_files(text) == {"mine.py": "y\n"}
    assert pages_run.python_blocks(text) == ["x\n"]


def test_the_two_commands():
    assert LINES[0] == (
        'python3 -m venv .venv && .venv/bin/pip install -e ".[demo]" && '
        ".venv/bin/python experiments/sentiment.py"
    )
    assert LINES[1].endswith('".[test]" && .venv/bin/pytest') and len(LINES) > 15


def test_lines_run_in_their_own_home_and_successful_ones_only_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(follow_readme, "date_and_commit", lambda clone: {"commit": clone.name})
    lines = ["echo $HOME $JAX_PLATFORMS >> a", "test -e b", "cat a"]
    (tmp_path / "clone").mkdir()
    follow = lambda: follow_readme.follow(lines, tmp_path / "clone", tmp_path / "home", tmp_path)
    assert [row["exit"] for row in follow()] == [0, 1, 0]
    assert (tmp_path / "followed" / "02.txt").read_text() == f"{tmp_path / 'home'}\n"
    lines.insert(1, "cp ../followed.json seen")
    assert [row["exit"] for row in follow()] == [0, 0, 1, 0]
    seen = json.loads((tmp_path / "clone" / "seen").read_text())
    # The record keeps earlier results of later lines.
    assert [row["line"] for row in seen] == [line for line in lines if line[:2] != "cp"]
    (tmp_path / "clone" / "b").touch()
    assert [row["exit"] for row in follow()] == [0, 0, 0, 0]
    assert (tmp_path / "clone" / "a").read_text().count("\n") == 1  # the first line ran once
    found = json.loads((tmp_path / "followed.json").read_text())
    assert [row["line"] for row in found] == lines and found[2]["commit"] == "clone"


@pytest.mark.ci  # not a fast test: the fast tests are one of the lines
def test_every_line_without_a_cloud_has_succeeded():
    """After a change to a line: `python tests/follow_readme.py --record`."""
    followed = {
        row["line"]: row["exit"] for row in json.loads(follow_readme.RECORD.read_text())["lines"]
    }
    assert followed == dict.fromkeys(LINES, 0)


def words(line: str) -> list[str]:
    """Return the last command of a line, without the folder of the environment."""
    found = shlex.split(line.split("&& ")[-1])
    return [found[0].removeprefix(".venv/bin/"), *found[1:]]


@pytest.mark.parametrize("line", [line for line in LINES if words(line)[0] in ("python", "jaxppo")])
def test_the_options_of_a_line_are_valid(line, monkeypatch):
    """Nothing is started: the parser of the script or command reads the line."""
    program, first, *rest = words(line)
    if program == "jaxppo":
        parse(commands.load(first)[1], args=rest)
    elif first == "-m":
        assert rest[0] == launch.__name__
        assert (ROOT / rest[3]).exists()
    else:
        read = []
        monkeypatch.setattr(
            cli, "script", lambda main, config, **_: read.append(parse(config, args=rest))
        )
        monkeypatch.setattr(sys, "path", [str((ROOT / first).parent), *sys.path])
        runpy.run_path(str(ROOT / first), run_name="__main__")
        assert len(read) == 1
