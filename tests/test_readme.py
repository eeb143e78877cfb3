"""README.md's Python blocks run, and its commands have valid options.

`follow_readme.py` runs the commands themselves.
"""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import follow_readme
import pytest
import toys

from jaxppo import cli, commands, launch
from jaxppo.cli import parse
from jaxppo.rewards.in_program import count_token

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = follow_readme.commands(README)


def test_the_swapped_parts_make_a_step(tmp_path):
    section = README.split("## Swap a part")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 8
    toy = toys.llama()
    names = {
        "config": toys.SETTINGS,
        "model": toy.model,
        "reward": count_token(3),
        "state": toys.state(toy),
        "prompts": toys.prompts(),
    }
    script = tmp_path / "swapped.py"
    script.write_text("\n".join(blocks))
    found = runpy.run_path(str(script), init_globals=names)
    metrics = {name: float(x) for name, x in found["metrics"].items()}
    assert int(found["state"].step) == 1 and metrics["skipped"] == 0 and metrics["grad_norm"] > 0
    # The reward is that of the swapped block, not count_token's.
    assert -toys.SETTINGS.response_length < metrics["reward"] <= 0
    assert metrics["mean_ratio"] > 0.5  # the loss's diagnostics are metrics


def test_commands_of_a_text():
    text = (
        "a\n```sh\nls  # all\n# no\n\n  cat '#1'\n```\n```python\nx\n```\n    "
        "dir\n```sh\npython tpu/tpu.py list\n```\n"
    )
    found = follow_readme.commands(text)
    assert found == ["ls", "cat '#1'", "python tpu/tpu.py list"]
    assert [follow_readme.needs_the_cloud(line) for line in found] == [False, False, True]
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
    assert followed == {line: 0 for line in LINES if not follow_readme.needs_the_cloud(line)}


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
    elif not follow_readme.needs_the_cloud(line):
        read = []
        monkeypatch.setattr(
            cli, "script", lambda main, config, **_: read.append(parse(config, args=rest))
        )
        monkeypatch.setattr(sys, "path", [str((ROOT / first).parent), *sys.path])
        runpy.run_path(str(ROOT / first), run_name="__main__")
        assert len(read) == 1
