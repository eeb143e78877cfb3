"""The command line: the list of verbs, their help, and errors."""

import json
import subprocess
import sys

import pytest

from jaxppo import commands
from jaxppo.config import RunConfig
from jaxppo.run.settings import to_dict


def exit_code() -> int:
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(
    ("argv", "code"), [([], 2), (["nonsense"], 2), (["--help"], 0), (["-h"], 0)]
)
def test_the_verbs_are_listed(monkeypatch, capsys, argv, code):
    monkeypatch.setattr(sys, "argv", ["jaxppo", *argv])
    assert exit_code() == code
    shown = capsys.readouterr().out
    for verb, (*_, about) in commands.VERBS.items():
        assert f"  {verb:10} {about}\n" in shown


def test_an_unknown_verb_is_an_error_with_the_nearest(monkeypatch, capsys):
    for verb, said in (
        ("smaple", "error: unknown verb 'smaple'; did you mean sample?\n"),
        ("xyz", "error: unknown verb 'xyz'\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["jaxppo", verb])
        assert exit_code() == 2
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("verb", commands.VERBS)
def test_the_help_of_a_verb_has_examples(verb, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxppo", verb, "--help"])
    assert exit_code() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: jaxppo {verb} ")
    assert any(line.startswith(f"$ jaxppo {verb}") for line in lines)
    assert (commands.load(verb)[1].__doc__ or "").splitlines()[0].split(":")[0] in " ".join(lines)


def test_help_is_fast():
    """`jaxppo --help` loads neither JAX nor another large library."""
    code = (
        "import contextlib, sys, time\n"
        "from jaxppo import __main__\n"
        "sys.argv = ['jaxppo', '--help']\n"
        "with contextlib.suppress(SystemExit):\n"
        "    __main__.main()\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'transformers', 'matplotlib', 'numpy', 'tyro'}\n"
        "print(sorted(heavy & set(sys.modules)), time.process_time())"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found, seconds = out.splitlines()[-1].rsplit(" ", 1)
    assert found == "[]"
    assert float(seconds) < 1  # of the processor; about 0.05


@pytest.mark.ci
def test_an_error_is_one_line(tmp_path):
    """In a process of its own: no traceback, exit code 2."""
    command = [sys.executable, "-m", "jaxppo", "sample", str(tmp_path / "nothing"), "Hi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: no run in")


def test_a_text_classifier_is_not_planned(tmp_path, monkeypatch, capsys):
    config = to_dict(RunConfig(model="", model_kind="classifier"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["jaxppo", "plan", str(tmp_path / "config.json")])
    assert exit_code() == 2
    assert "a text classifier is no policy" in capsys.readouterr().err
