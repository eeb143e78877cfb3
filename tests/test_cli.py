import glob
import os
import re
import subprocess
import sys
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


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_no_device_is_one_line_and_2(kind, monkeypatch, capsys):
    """JAX raises either, and a traceback of its own."""

    def devices():
        raise kind("no plugin")

    def main(options):
        cli.jax.devices()

    monkeypatch.setattr(cli.jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert code_of(run, [], main) == 2
    said = "JAX finds no device (JAX_PLATFORMS is 'cuda'); set JAX_PLATFORMS=cpu, or see"
    assert capsys.readouterr().err == f"error: {said} `jaxppo doctor`\n"


def test_an_error_with_devices_is_not_hidden():
    def main(options):
        raise RuntimeError("other")

    with pytest.raises(RuntimeError, match="other"):
        run([], main)


def test_stopped_by_the_user(capsys):
    def main(options):
        raise KeyboardInterrupt

    assert code_of(run, [], main) == 130
    assert "--resume" in capsys.readouterr().err


def test_help_is_short_and_help_all_is_not(capsys):
    assert code_of(run, ["--help"]) == 0
    short = capsys.readouterr().out
    assert code_of(run, ["--help-all"]) == 0
    full = capsys.readouterr().out
    assert "rollouts a step, over all devices" in short and "--clip-low" not in short
    assert "--clip-low" in full and "--[no-]resume" in full
    assert "passes over each batch of rollouts" in full


def test_help_shows_the_defaults_of_the_chosen_algorithm(capsys):
    assert code_of(run, ["--algorithm", "grpo", "--help"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--group-size INT [^-]*-relative advantages [^-]* \(default: 8\)", found)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--lora-r", "8"],
            "no option --lora-r; here it is --lora (the rank; 0 = train all weights)",
        ),
        (["--num-ppo-epochs=4"], "no option --num-ppo-epochs; here it is --epochs"),
        (["--seed", "1", "--bf16"], "no option --bf16; here it is --dtype bfloat16"),
        (["--cliprange", ".2"], "no option --cliprange; here it is --clip-low and --clip-high"),
        (
            ["data.max_prompt_length=8"],
            "no option data.max_prompt_length; here it is --prompt-length",
        ),
        (["--quux"], "Unrecognized options: --quux; --help-all lists all options"),
    ],
)
def test_a_name_of_another_library_gives_ours(args, said, capsys):
    assert code_of(run, args) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_program_without_a_tpu_says_nothing_about_it():
    """libtpu, if it is installed, is given a kind and a name, and finds no TPU."""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        pytest.skip("has a TPU")
    code = (
        "import jax, os, jaxppo\n"
        "print(os.environ['TPU_ACCELERATOR_TYPE'], os.environ['TPU_WORKER_HOSTNAMES'])\n"
        "print({device.platform for device in jax.devices()} - {'cpu', 'gpu'} or 'no TPU')"
    )
    drop = ("JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    env = {name: x for name, x in os.environ.items() if name not in drop}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["v5litepod-1", "localhost", "no", "TPU"]
    assert "TPU_ACCELERATOR_TYPE" not in done.stderr and "hostname" not in done.stderr


def test_what_the_user_says_of_a_tpu_stays():
    code = "import os, jaxppo; print(os.environ['TPU_ACCELERATOR_TYPE'])"
    env = {**os.environ, "TPU_ACCELERATOR_TYPE": "v4-8"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "v4-8\n"
