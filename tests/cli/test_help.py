import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import tyro

from jaxppo.cli.help import FIRST, NEVER, TABLES, describe, format_help
from jaxppo.config import Config, RunConfig

GROUPS = [
    "batch", "algorithm", "advantages", "reward", "KL to the reference", "distillation", "sampling",
    "optimizer", "model and adapters", "precision and memory", "run", "devices",
]  # fmt: skip


@dataclass(frozen=True)
class Script(RunConfig):
    """A script's options."""

    folder: tyro.conf.Positional[Path | None] = None
    """where to write"""
    width: int = 3
    """width of
    a network
    """
    kinds: tuple[str, ...] = ("a", "b")
    mode: Literal["x", "y"] = "x"
    """how"""
    file: Path | None = None
    """default: none"""
    clip_low: float | None = None
    name: str = "mine"
    """another name"""


def help_of(defaults: Config, **options) -> str:
    return format_help(defaults, description="What it does.", prog="prog", **options)


def section(text: str, title: str) -> str:
    """The lines of a group, joined."""
    found = [block for block in text.split("\n\n") if block.startswith(f"{title}\n")]
    assert len(found) == 1
    return " ".join(found[0].split()[len(title.split()) :])


def options_in(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith("  --")]
    names = [line.split()[0].replace("--[no-]", "--") for line in lines]
    return [name for name in names if name not in ("--help-all", "--config")]


@pytest.mark.parametrize("kind", [Config, RunConfig])
def test_every_setting_has_one_group_and_a_meaning(kind):
    found = describe(kind)
    assert list(found) == [field.name for field in dataclasses.fields(kind)]
    assert [name for name, (group, text) in found.items() if group not in GROUPS or not text] == []


def test_the_groups_are_in_order():
    lines = help_of(Script(), every=True).splitlines()
    titles = ["arguments", "task", *GROUPS, "help and settings"]
    assert [line for line in lines if line in titles] == titles


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("batch_size", "batch"),
        ("loss", "algorithm"),
        ("lam", "advantages"),
        ("missing_eos_penalty", "reward"),
        ("reward_model", "reward"),
        ("kl_coef", "KL to the reference"),
        ("teacher", "distillation"),
        ("temperature", "sampling"),
        ("lr", "optimizer"),
        ("lora", "model and adapters"),
        ("model", "model and adapters"),
        ("dtype", "precision and memory"),
        ("steps", "run"),
        ("resume", "run"),
        ("mesh", "devices"),
    ],
)
def test_groups_of_some_settings(name, group):
    assert describe(RunConfig)[name][0] == group


def test_a_subclass_keeps_groups_and_may_change_the_meaning():
    found = describe(Script)
    assert found["width"] == ("task", "width of a network")
    assert found["name"] == ("run", "another name")
    assert found["clip_low"] == describe(Config)["clip_low"]


def test_a_class_without_a_source_has_options_without_meaning():
    made = dataclasses.make_dataclass("Made", [("x", int, 3)], bases=(Config,), frozen=True)
    assert describe(made)["x"] == ("task", "")
    assert describe(made)["lr"] == describe(Config)["lr"]
    assert section(help_of(made()), "task") == "--x INT (default: 3)"


def test_the_short_help_has_the_first_options_and_those_of_the_script():
    text = help_of(Script())
    own = ["--width", "--kinds", "--mode", "--file"]
    assert len(FIRST) == 20
    assert sorted(options_in(text)) == sorted(
        [*own, *(f"--{name.replace('_', '-')}" for name in FIRST)]
    )
    rest = len(dataclasses.fields(RunConfig)) - len(FIRST) - len(NEVER)
    assert text.splitlines()[-1] == f"{rest} more options: --help-all"


def test_the_full_help_has_all_but_what_scripts_set():
    text = help_of(Script(), every=True)
    names = [field.name for field in dataclasses.fields(Script)]
    hidden = (*NEVER, "folder")
    expected = {f"--{name.replace('_', '-')}" for name in names if name not in hidden}
    assert set(options_in(text)) == expected
    assert "more options" not in text


def test_the_names_in_the_lists_exist():
    names = {field.name for field in dataclasses.fields(RunConfig)}
    assert {*FIRST, *NEVER, *TABLES} <= names


def test_kinds_of_values_and_defaults():
    text = help_of(Script(lr=0.5), every=True)
    assert text.startswith("usage: prog [FOLDER] [OPTIONS]\n\nWhat it does.\n\n")
    assert section(text, "arguments") == "[FOLDER] where to write"
    assert section(text, "task") == (
        "--width INT width of a network (default: 3) --kinds TEXT ... (default: a b) "
        "--mode {x,y} how (default: x) --file PATH default: none"
    )
    found = " ".join(text.split())
    assert "--lr FLOAT initial learning rate (after the warm-up) (default: 0.5)" in found
    said = "the ratio is clipped at 1 - clip_low; None = the loss's own default"
    assert f"--clip-low FLOAT {said} (default: None)" in found
    assert "--loss-settings TEXT FLOAT ..." in found
    assert "by name: token_mean, token_sum, sequence_mean" in found
    assert "--[no-]kl-adaptive adapt kl_coef towards kl_target (default: yes)" in found
    assert "--track TEXT tensorboard" in found and "(default: )" not in found


@pytest.mark.parametrize("columns", [60, 88, 300])
def test_lines_fit_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = help_of(RunConfig(), every=True).splitlines()
    assert max(map(len, lines)) <= min(columns, 100)
