import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from runs import RUN, TEXTS, run_train

from jaxppo import commands, ppo
from jaxppo.commands import sample
from jaxppo.data.prompts import encode
from jaxppo.errors import UserError
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files, load, sampler


def exit_code() -> int:
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture(scope="module")
def loaded():
    return load.load_policy(RUN)


@pytest.fixture(scope="module")
def prompts(loaded):
    return encode(TEXTS, loaded[1].tokenizer, 4, too_long="last")


@pytest.fixture(scope="module")
def read(loaded):
    config, policy = loaded
    return sampler.Sampler(config, policy, rows=4)


@pytest.fixture(scope="module")
def moved(loaded):
    """A state whose adapters are no longer zero."""
    config, policy = loaded
    params = jax.tree.map(lambda x: x + 0.1, policy.params)
    return ppo.init_state(config, params, policy.frozen, jax.random.key(0))


@pytest.fixture(scope="module")
def stream(loaded, moved):
    config, policy = loaded
    return sample.Stream(config, policy, moved)


def test_a_stream_equals_the_sampler(stream, read, moved, prompts):
    want = [sample.tokens for sample in read(moved, prompts, seed=3)[:4]]
    assert [list(stream(text, seed=3, index=i)) for i, text in enumerate(TEXTS[:4])] == want


def test_a_stream_never_compiles_again(stream, caplog):
    """Whatever the prompt, its number, the seed and the token's number."""
    list(stream("first", seed=0))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for i, text in enumerate(["a", "of another length", "ö"]):
            list(stream(text, seed=i, index=i))
    compiled = [
        x.getMessage() for x in caplog.records if "Finished XLA compilation" in x.getMessage()
    ]
    assert compiled == []
    with jax.log_compiles(), caplog.at_level("WARNING"):  # the log shows a program, if there is one
        jax.jit(lambda x: x * 3.25)(1.5)
    assert any("Finished XLA compilation" in x.getMessage() for x in caplog.records)


def test_a_stream_ends_at_eos(loaded, moved):
    """Each id is made the end of text in turn: it is the last one that comes."""
    config, policy = loaded
    first = list(sample.Stream(config, policy, moved, greedy=True)("ab", seed=0))
    assert len(first) == 3  # --response-length, no end of text among them
    cut = sample.Stream(replace(config, eos=first[1]), policy, moved, greedy=True)("ab", seed=0)
    assert list(cut) == first[: first.index(first[1]) + 1]


def test_a_stream_has_stop_texts_and_min_tokens():
    """As the sampler's program has them. A token is a byte, and the stop text is two of them."""
    settings = replace(RUN, response_length=12)
    config, policy = load.load_policy(settings)
    params = jax.tree.map(lambda x: x + 0.1, policy.params)
    start = lambda policy: ppo.init_state(config, params, policy.frozen, jax.random.key(0))
    prompts = encode(TEXTS, policy.tokenizer, 4, too_long="last")
    config = replace(config, eos=ord("a"), min_tokens=2)
    plain = [
        x.tokens for x in sampler.Sampler(config, policy, rows=7)(start(policy), prompts, seed=3)
    ]
    letter = lambda token: policy.tokenizer.token(token).isascii()
    row, t = next(
        (row, t)
        for row, tokens in enumerate(plain)
        for t in range(3, len(tokens) - 1)
        if letter(tokens[t - 1]) and letter(tokens[t])
    )
    text = policy.tokenizer.decode(plain[row][t - 1 : t + 1])
    _, policy = load.load_policy(replace(settings, stop=(text,)))
    config = replace(config, stop=(text,))
    done = sampler.Sampler(config, policy, rows=7)(start(policy), prompts, seed=3)
    assert done[row].tokens == plain[row][: t + 1] and done[row].finished
    assert all(len(x.tokens) > 2 for x in done)
    stream = sample.Stream(config, policy, start(policy))
    assert [list(stream(text, seed=3, index=i)) for i, text in enumerate(TEXTS)] == [
        x.tokens for x in done
    ]


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
        with pytest.raises(UserError, match="--temperature must be 0 or"):
            sample.with_limits(settings, temperature=temperature, max_tokens=None)


def test_fewer_tokens_are_the_first_of_more(loaded, read, moved, prompts):
    config, policy = loaded
    limited = sample.with_limits(config, temperature=None, max_tokens=2)
    short = sampler.Sampler(limited, policy, rows=4)(moved, prompts, seed=0)
    for one, other in zip(short, read(moved, prompts, seed=0), strict=True):
        assert one.tokens == other.tokens[:2]


def test_half_a_character_is_held_back(loaded):
    """€ is three bytes, 🙂 four; with one id for each byte nothing shows before the last one."""
    tokenizer = loaded[1].tokenizer
    text = "a€ 🙂b"
    assert list(sample.decode_stream(tokenizer, tokenizer.encode(text))) == [
        "a",
        "€",
        " ",
        "🙂",
        "b",
    ]
    broken = tokenizer.encode("€")[:2] + tokenizer.encode(
        "x"
    )  # never finished: shown once something follows
    assert list(sample.decode_stream(tokenizer, broken)) == ["\ufffdx"]
    assert list(
        sample.decode_stream(tokenizer, tokenizer.encode("a") + tokenizer.encode("€")[:2])
    ) == ["a", "\ufffd"]
    assert list(sample.decode_stream(tokenizer, [tokenizer.eos_id])) == []


def test_half_a_character_of_the_prompt_is_completed(loaded):
    tokenizer = loaded[1].tokenizer
    first, *rest = tokenizer.encode("€b")
    prompt = [*tokenizer.encode("a"), first]
    assert list(sample.decode_stream(tokenizer, rest, prompt)) == ["€", "b"]


class Parrot(sample.Stream):
    """A stream that always gives the same answer, and records its prompts."""

    def __init__(self, tokenizer, answer: str, room: int = 1000):
        self.tokenizer, self.answer, self.heard = tokenizer, answer, []
        self.config = replace(RUN, prompt_length=room)

    def __call__(self, text, *, seed, index=0, start=None):
        self.heard.append((text, index, start))
        yield from self.tokenizer.encode(self.answer)


@pytest.fixture
def chatting(loaded):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    return tokenizer


def test_a_line_is_a_prompt(loaded):
    parrot, said = Parrot(byte_tokenizer(), "ö!"), []
    sample.run_chat(parrot, ["one", " ", "two"], said.append, seed=0, chat=False)
    assert said == ["ö", "!", "\n", "ö", "!", "\n"]
    assert parrot.heard == [
        ("one", 0, None),
        ("two", 1, None),
    ]  # a blank line is no prompt; the noise depends on the index


def test_a_prompt_has_the_format_of_training(loaded):
    """With the token that starts a document where the run's prompts had it, and in the run's
    format.
    """
    parrot = Parrot(byte_tokenizer(), "!")
    parrot.config = replace(parrot.config, prompt_start=True, prompt_format="{prompt}\n=")
    sample.run_chat(parrot, ["one {prompt}"], lambda piece: None, seed=0, chat=False)
    assert parrot.heard == [("one {prompt}\n=", 0, 256)]


def test_a_conversation_remembers_and_forgets(chatting, capsys):
    parrot = Parrot(chatting, "yes")
    sample.run_chat(parrot, ["one", "two"], lambda piece: None, seed=0, chat=True)
    assert [text for text, _, _ in parrot.heard] == ["<u>one<a>", "<u>one<a>yes<u>two<a>"]
    assert parrot.heard[0][2] is None  # the format has its own beginning
    short = Parrot(chatting, "yes", room=20)  # the second has 21 bytes
    sample.run_chat(short, ["one", "two"], lambda piece: None, seed=0, chat=True)
    assert [text for text, _, _ in short.heard] == ["<u>one<a>", "<u>two<a>"]
    tight = Parrot(chatting, "yes", room=8)  # the last message stays, and is cut with a note
    sample.run_chat(tight, ["one"], lambda piece: None, seed=0, chat=True)
    assert tight.heard[0][0] == "<u>one<a>"
    assert (
        "1 of 1 prompts has more than 8 tokens (--prompt-length of the run) and lost its beginning"
        in capsys.readouterr().err
    )
    with pytest.raises(
        UserError,
        match="a turn of one word has 7 tokens, but the run was trained on prompts of at most 6",
    ):
        sample.run_chat(
            Parrot(chatting, "yes", room=6), ["one"], lambda piece: None, seed=0, chat=True
        )


def test_a_conversation_needs_a_chat_template(loaded):
    parrot = Parrot(byte_tokenizer(), "yes")
    with pytest.raises(UserError, match="no chat template"):  # before a line is asked for
        sample.run_chat(
            parrot, iter(lambda: pytest.fail("asked"), None), lambda piece: None, seed=0, chat=True
        )


def test_an_interrupt_ends_one_response_only(loaded):
    class Slow(Parrot):
        def __call__(self, text, **options):
            yield from super().__call__(text, **options)
            raise KeyboardInterrupt

    said: list[str] = []
    sample.run_chat(Slow(byte_tokenizer(), "ab"), ["one", "two"], said.append, seed=0, chat=False)
    assert "".join(said) == "ab\nab\n"


def test_lines_typed_and_shown(monkeypatch, capsys):
    lines = iter(["one", "two"])
    monkeypatch.setattr(
        "builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError)
    )
    assert list(sample.typed_lines()) == ["one", "two"]
    capsys.readouterr()
    sample.show("a\x1b[2J\nb\t")
    assert capsys.readouterr().out == "a\\x1b[2J\nb "


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


@pytest.mark.ci
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
