from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxppo import cli
from jaxppo.config import RunConfig
from jaxppo.errors import UserError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@dataclass(frozen=True)
class Options(RunConfig):
    """Options of a script."""

    name: str = "mine"


@dataclass(frozen=True)
class Tables:
    """Options of a script that trains nothing."""

    traceback: bool = False


def run(args, main=lambda options: None):
    """What a script made of its options."""
    seen = []

    def script(options):
        seen.append(options)
        main(options)

    cli.script(script, Options, args=args)
    return seen[0]


def code_of(run, *args) -> int:
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_options_arrive():
    options = run(
        ["--steps", "7", "--clip-low", "0.1", "--no-kl-adaptive", "--resume", "--model", "a/b"]
    )
    assert (
        options.steps,
        options.clip_low,
        options.kl_adaptive,
        options.resume,
        options.model,
    ) == (7, 0.1, False, True, "a/b")
    assert options.name == "mine"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stepz", "7"], ["--stepz", "--steps"]),
        (["--steps", "many"], ["many", "--steps"]),
        (["--lr"], ["--lr"]),
    ],
)
def test_a_wrong_option_is_one_line_and_2(args, words, capsys):
    assert code_of(run, args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("error: ")
    for word in words:
        assert word in shown.err


def test_a_user_error_is_one_line_and_2(capsys):
    def main(options):
        raise UserError("30 rows are not 4 x 8; use 32")

    assert code_of(run, [], main) == 2
    assert capsys.readouterr().err == "error: 30 rows are not 4 x 8; use 32\n"
    with pytest.raises(UserError):  # asked for
        run(["--traceback"], main)
    with pytest.raises(UserError):  # and so by options that are no run's
        cli.script(main, Tables, args=["--traceback"], about="x")


def test_other_errors_are_not_hidden():
    def main(options):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([], main)


def test_stopped_by_the_user(capsys):
    def main(options):
        raise KeyboardInterrupt

    assert code_of(run, [], main) == 130
    assert "--resume" in capsys.readouterr().err


def test_help_lists_every_option_with_its_meaning(capsys):
    assert code_of(run, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--clip-low" in shown and "--steps-per-call" in shown
    assert "passes over each batch of rollouts" in shown
