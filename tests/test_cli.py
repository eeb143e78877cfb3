import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxppo import cli, commands
from jaxppo.commands import sample
from jaxppo.config import RunConfig
from jaxppo.errors import UserError
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run.settings import to_dict

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


@pytest.mark.parametrize(
    ("argv", "code"), [([], 2), (["nonsense"], 2), (["--help"], 0), (["-h"], 0)]
)
def test_the_command_lists_its_verbs(monkeypatch, capsys, argv, code):
    monkeypatch.setattr(sys, "argv", ["jaxppo", *argv])
    assert code_of(commands.main) == code
    shown = capsys.readouterr().out
    for verb in commands.VERBS:
        _, options = commands.load(verb)
        assert f"  {verb} " in shown
        assert (options.__doc__ or "").splitlines()[0] in shown


def test_a_text_classifier_is_not_planned(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps(to_dict(RunConfig(model="", model_kind="classifier")))
    )
    monkeypatch.setattr(sys, "argv", ["jaxppo", "plan", str(tmp_path / "config.json")])
    assert code_of(commands.main) == 2
    assert "a text classifier is no policy" in capsys.readouterr().err


def test_a_verb_that_is_none_is_an_error_with_the_nearest(monkeypatch, capsys):
    for verb, said in (
        ("smaple", "error: 'smaple' is no verb; perhaps sample\n"),
        ("xyz", "error: 'xyz' is no verb\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["jaxppo", verb])
        assert code_of(commands.main) == 2
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("verb", commands.VERBS)
def test_every_verbs_help_has_examples(verb, monkeypatch, capsys):
    """A line each, as they are typed."""
    monkeypatch.setattr(sys, "argv", ["jaxppo", verb, "--help"])
    assert code_of(commands.main) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: jaxppo {verb} ")
    assert any(line.startswith(f"$ jaxppo {verb}") for line in lines)
    assert (commands.load(verb)[1].__doc__ or "").splitlines()[0].split(":")[0] in " ".join(lines)


def test_help_answers_without_jax():
    """In a process of its own: here JAX is loaded already. Each verb, with the imports, is bound by
    a second of the processor.
    """
    code = (
        "import contextlib, io, sys, time\n"
        "from jaxppo import cli\n"
        "worst, began = 0.0, time.process_time()\n"
        "for verb in cli.VERBS:\n"
        "    start = time.process_time()\n"
        "    sys.argv = ['jaxppo', verb, '--help']\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        cli.main()\n"
        "    assert '--help' in out.getvalue(), verb\n"
        "    worst = max(worst, time.process_time() - start)\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'transformers', 'matplotlib', 'numpy', 'huggingface_hub', 'packaging'}\n"
        "print(sorted(heavy & set(sys.modules)), began + worst)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    found, seconds = out.rsplit(" ", 1)
    assert found == "[]"
    assert float(seconds) < 1  # of the processor; about 0.4


def test_an_error_in_a_process_of_its_own(tmp_path):
    """As a user sees it: one line, no traceback, 2."""
    code = "from jaxppo import cli; cli.main()"
    command = [sys.executable, "-c", code, "sample", str(tmp_path / "nothing"), "Hi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: no run in")


def test_a_reward_and_prompts_of_ones_own_then_sample(
    tmp_path, capsys, monkeypatch, quickly_compiled
):
    """`experiments/custom_reward.py` with a tiny model, and `jaxppo sample` of what it wrote."""
    spec = importlib.util.spec_from_file_location("custom_reward", EXPERIMENTS / "custom_reward.py")
    assert spec is not None and spec.loader is not None
    custom = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_reward", custom)
    spec.loader.exec_module(custom)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "abc"}\n')
    args = [
        "--tiny",
        "--parallel",
        "jit",
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--minibatches",
        "2",
        "--response-length",
        "3",
        "--prompt-length",
        "4",
    ]
    args += ["--runs", str(tmp_path), "--name", "mine", "--data", str(tmp_path / "prompts.jsonl")]
    cli.script(custom.main, custom.Custom, args=args)
    shown = capsys.readouterr().out
    assert "step 1/2 " in shown and "step 2/2 " in shown
    assert f"jaxppo sample {tmp_path / 'mine'}" in shown

    def sampled(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["jaxppo", "sample", *words])
        commands.main()
        return capsys.readouterr().out.splitlines()

    run = str(tmp_path / "mine")
    lines = sampled(run, "Hello", "you")
    assert len(lines) == 2
    assert lines[0].startswith("Hello") and lines[1].startswith("you")
    monkeypatch.setattr(
        Tokenizer, "apply_chat", lambda self, messages, **options: messages[-1]["content"]
    )
    assert sampled(run, "--chat", "ab")[0].startswith("ab\t")  # a turn, and what is answered to it
    (tmp_path / "mine").rename(tmp_path / "policy")  # as that of a task's whole way
    greedy = [
        sampled(str(tmp_path), "--temperature", "0", "--max-tokens", "2", "--seed", seed, "Hello")
        for seed in "12"
    ]
    assert greedy[0] == greedy[1] and len(greedy[0]) == 1

    monkeypatch.setattr(sys, "stdin", Terminal(["Hello", "", "Hello"]))
    shown = "\n".join(sampled(str(tmp_path)))
    assert shown.count("> ") == 4  # three lines, and the end
    assert lines[0].removeprefix("Hello") in shown  # the first line's noise is the first prompt's


class Terminal(io.StringIO):
    """Lines that somebody types."""

    def __init__(self, lines: list[str]):
        super().__init__("".join(f"{line}\n" for line in lines))

    def isatty(self) -> bool:
        return True


def test_prompts_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n \n two\n"))  # piped
    (tmp_path / "some.txt").write_bytes(
        "one\r\n \n two\u2028".encode()
    )  # another sign for the end of a line ends none
    (tmp_path / "some.jsonl").write_text('{"prompt": "one"}\n{"prompt": "t\\nwo"}\n')
    found = lambda *prompts, **options: sample.prompts_of(
        sample.SampleOptions(tmp_path, prompts, **options)
    )
    asked = lambda *prompts, **options: [words["prompt"] for words in found(*prompts, **options)]
    assert asked("one", " two") == ["one", " two"]
    assert asked() == ["one", " two"]
    assert asked(file=tmp_path / "some.txt") == ["one", " two\u2028"]
    assert asked(file=tmp_path / "some.jsonl") == ["one", "t\nwo"]
    (tmp_path / "more.jsonl").write_text('{"prompt": "one", "aspect": "aim", "number": 3}\n')
    assert found(file=tmp_path / "more.jsonl") == [{"prompt": "one", "aspect": "aim"}]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["x", "--file", "some.txt"], "give one of them"),
        (["--file", "nowhere.txt"], "nowhere.txt cannot be read as prompts"),
        (["--file", "bytes.txt"], "bytes.txt cannot be read as prompts"),
        (["--file", "empty.txt"], "no prompts"),
        (["--file", "bad.jsonl"], "bad.jsonl, line 1"),
    ],
)
def test_prompts_that_cannot_be_read(words, complaint, tmp_path, monkeypatch, capsys):
    """Before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("config.json", b"{}"),
        ("bytes.txt", b"\xff"),
        ("empty.txt", b"\n\n"),
        ("bad.jsonl", b"{}"),
    ):
        Path(name).write_bytes(text)
    monkeypatch.setattr(sys, "argv", ["jaxppo", "sample", ".", *words])
    assert code_of(commands.main) == 2
    shown = capsys.readouterr().err
    assert complaint in shown and len(shown.splitlines()) == 1


def test_sample_reads_standard_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("  \n\n"))
    monkeypatch.setattr(sys, "argv", ["jaxppo", "sample", str(tmp_path)])
    assert code_of(commands.main) == 2
    assert capsys.readouterr().err.startswith("error: no prompts")
