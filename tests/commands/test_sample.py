import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from runs import RUN, run_train

from jaxppo import commands
from jaxppo.commands import sample
from jaxppo.config import check_numbers
from jaxppo.errors import UserError
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files, sampler


def exit_code() -> int:
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_a_sample_as_json():
    done = sampler.Sample("[pad]x", "é\n", [195, 169, 10], 0.5, True)
    assert sample.as_json("x", done, greedy=False) == (
        '{"prompt": "x", "response": "\\u00e9\\n", "kl": 0.5, "finished": true, '
        '"tokens": [195, 169, 10]}'
    )
    greedy = sample.as_json("x", done, greedy=True)
    assert json.loads(greedy)["kl"] is None  # the log-ratio is no estimate of it
    bad = sample.as_json("x", done._replace(kl=float("nan")), greedy=False)
    assert json.loads(bad)["kl"] is None


def test_limits_of_the_settings():
    settings = replace(RUN, response_length=10, temperature=0.5)
    same = sample.with_limits(settings, temperature=None, max_tokens=None)
    assert same == settings
    other = sample.with_limits(settings, temperature=2.0, max_tokens=4)
    assert (other.temperature, other.response_length) == (2.0, 4)
    assert (
        sample.with_limits(settings, temperature=0.0, max_tokens=10).temperature == 0.5
    )  # the sampler is greedy then
    for tokens in (11, 0, -1):
        with pytest.raises(
            UserError, match=f"--max-tokens {tokens}: .* at most 10 tokens; give 1 to 10"
        ):
            sample.with_limits(settings, temperature=None, max_tokens=tokens)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--temperature must be"):
            check_numbers(sample.SampleOptions(temperature=temperature))


@pytest.mark.ci
def test_fewer_tokens_are_the_first_of_more(loaded, read, moved, prompts):
    config, policy = loaded
    limited = sample.with_limits(config, temperature=None, max_tokens=2)
    short = sampler.Sampler(limited, policy, rows=4)(moved, prompts, seed=0)
    for one, other in zip(short, read(moved, prompts, seed=0), strict=True):
        assert one.tokens == other.tokens[:2]


class Terminal(io.StringIO):
    """Standard input at a terminal."""

    def __init__(self, lines: list[str]):
        super().__init__("".join(f"{line}\n" for line in lines))

    def isatty(self) -> bool:
        return True


@pytest.mark.ci
def test_training_then_sampling(tmp_path, capsys, monkeypatch):
    """`jaxppo train` with a tiny model, and `jaxppo sample` of what it wrote."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "abc"}\n')
    args = [
        "--tiny",
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
    run_train(*args)
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
    asked = [json.loads(line) for line in sampled(run, "--json", "Hello", "you")]
    assert [x["prompt"] for x in asked] == ["Hello", "you"]
    assert [files.printable(x["prompt"] + x["response"]) for x in asked] == lines
    assert all(len(x["tokens"]) <= 3 and isinstance(x["kl"], float) for x in asked)
    first = sampled(run, "--checkpoint", "0", "--json", "Hello", "you")
    assert all(abs(json.loads(line)["kl"]) < 1e-4 for line in first)  # not trained yet
    monkeypatch.setattr(sys, "argv", ["jaxppo", "sample", run, "--checkpoint", "7", "Hello"])
    assert exit_code() == 2
    said = capsys.readouterr().err
    assert "--checkpoint 7: there is no such step; choose best, newest, or one of 0, 2" in said
    assert len(said.splitlines()) == 1
    assert lines[0].startswith("Hello") and lines[1].startswith("you")
    monkeypatch.setattr(
        Tokenizer, "apply_chat", lambda self, messages, **options: messages[-1]["content"]
    )
    assert sampled(run, "--chat", "ab")[0].startswith("ab\t")  # a turn, and what is answered to it
    (tmp_path / "mine").rename(tmp_path / "policy")  # as in a task's folder
    greedy = [
        sampled(str(tmp_path), "--temperature", "0", "--max-tokens", "2", "--seed", seed, "Hello")
        for seed in "12"
    ]
    assert greedy[0] == greedy[1] and len(greedy[0]) == 1

    monkeypatch.setattr(sys, "stdin", Terminal(["Hello", "", "Hello"]))
    shown = "\n".join(sampled(str(tmp_path)))
    assert shown.count("> ") == 4  # three lines, and the end
    assert lines[0].removeprefix("Hello") in shown  # the first line's noise is the first prompt's


def test_sources_of_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n \n two\n"))  # piped
    (tmp_path / "some.txt").write_bytes(
        "one\r\n \n two\u2028".encode()
    )  # another sign for the end of a line ends none
    (tmp_path / "some.jsonl").write_text('{"prompt": "one"}\n{"prompt": "t\\nwo"}\n')
    found = lambda *prompts, **options: sample.read_prompts(
        sample.SampleOptions(tmp_path, prompts, **options)
    )
    asked = lambda *prompts, **options: [words["prompt"] for words in found(*prompts, **options)]
    assert asked("one", " two") == ["one", " two"]
    assert asked() == ["one", " two"]
    assert asked(file=tmp_path / "some.txt") == ["one", " two\u2028"]
    assert asked(file=tmp_path / "some.jsonl") == ["one", "t\nwo"]
    (tmp_path / "some.txt").write_bytes(b"\xef\xbb\xbfone\r two\r\n")  # of another editor
    assert asked(file=tmp_path / "some.txt") == ["one", " two"]
    piped = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\n two\r\n"), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", piped)
    assert asked() == ["one", " two"]
    (tmp_path / "more.jsonl").write_text('{"prompt": "one", "aspect": "aim", "number": 3}\n')
    assert found(file=tmp_path / "more.jsonl") == [{"prompt": "one", "aspect": "aim"}]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["x", "--file", "some.txt"], "give one of them"),
        (["--file", "nowhere.txt"], "nowhere.txt cannot be read (No such file or directory)"),
        (["--file", "bytes.txt"], "bytes.txt is not UTF-8 (byte 1); save it as UTF-8"),
        (["--file", "empty.txt"], "no prompts"),
        (["--file", "bad.jsonl"], "bad.jsonl, line 1"),
    ],
)
def test_unreadable_prompts(words, complaint, tmp_path, monkeypatch, capsys):
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
    assert exit_code() == 2
    shown = capsys.readouterr().err
    assert complaint in shown and len(shown.splitlines()) == 1


def test_empty_standard_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("  \n\n"))
    monkeypatch.setattr(sys, "argv", ["jaxppo", "sample", str(tmp_path)])
    assert exit_code() == 2
    assert capsys.readouterr().err.startswith("error: no prompts")


@pytest.mark.slow
def test_chats_of_a_file_and_a_system_message(tmp_path, capsys, monkeypatch):
    """A run is sampled with the file of chats that it was trained on."""
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a?"}],
        [{"role": "user", "content": "bc?"}],
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in chats))
    options = ["--tiny", "--data", str(data), "--runs", str(tmp_path), "--steps", "1"]
    run_train(*options, "--batch-size", "4", "--response-length", "3", "--prompt-start")
    run = str(tmp_path / "train")

    def sampled(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["jaxppo", "sample", run, *words])
        commands.main()
        return capsys.readouterr().out.splitlines()

    capsys.readouterr()
    lines = sampled("--file", str(data))
    assert len(lines) == 2 and lines[0].startswith("a?\t") and lines[1].startswith("bc?\t")
    found = [json.loads(line) for line in sampled("--file", str(data), "--json")]
    assert [row["prompt"] for row in found] == chats
    # a text among chats has the response that it has alone, with the run's start token
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(json.dumps({"prompt": "ab"}) + "\n" + data.read_text())
    alone, together = sampled("ab", "--json"), sampled("--file", str(mixed), "--json")
    assert json.loads(alone[0])["tokens"] == json.loads(together[0])["tokens"]
    # the same chat, given as a turn and a system message, has the same response
    given = sampled("--chat", "--system", "Be brief.", "a?")
    assert given == lines[:1]
