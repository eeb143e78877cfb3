from dataclasses import replace

import jax
import pytest
from runs import RUN, TEXTS

from jaxppo import ppo
from jaxppo.commands import chat
from jaxppo.data.prompts import encode
from jaxppo.errors import UserError
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.run import load, sampler


@pytest.fixture(scope="module")
def stream(loaded, moved):
    config, policy = loaded
    return chat.Stream(config, policy, moved)


@pytest.mark.ci
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
    first = list(chat.Stream(config, policy, moved, greedy=True)("ab", seed=0))
    assert len(first) == 3  # --response-length, no end of text among them
    cut = chat.Stream(replace(config, eos=first[1]), policy, moved, greedy=True)("ab", seed=0)
    assert list(cut) == first[: first.index(first[1]) + 1]


@pytest.mark.ci
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
    stream = chat.Stream(config, policy, start(policy))
    assert [list(stream(text, seed=3, index=i)) for i, text in enumerate(TEXTS)] == [
        x.tokens for x in done
    ]


def test_half_a_character_is_held_back(loaded):
    """€ is three bytes, 🙂 four; with one id for each byte nothing shows before the last one."""
    tokenizer = loaded[1].tokenizer
    text = "a€ 🙂b"
    assert list(chat.decode_stream(tokenizer, tokenizer.encode(text))) == ["a", "€", " ", "🙂", "b"]
    broken = tokenizer.encode("€")[:2] + tokenizer.encode(
        "x"
    )  # never finished: shown once something follows
    assert list(chat.decode_stream(tokenizer, broken)) == ["\ufffdx"]
    assert list(
        chat.decode_stream(tokenizer, tokenizer.encode("a") + tokenizer.encode("€")[:2])
    ) == ["a", "\ufffd"]
    assert list(chat.decode_stream(tokenizer, [tokenizer.eos_id])) == []


def test_half_a_character_of_the_prompt_is_completed(loaded):
    tokenizer = loaded[1].tokenizer
    first, *rest = tokenizer.encode("€b")
    prompt = [*tokenizer.encode("a"), first]
    assert list(chat.decode_stream(tokenizer, rest, prompt)) == ["€", "b"]


class Parrot(chat.Stream):
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
    chat.run_chat(parrot, ["one", " ", "two"], said.append, seed=0, chat=False)
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
    chat.run_chat(parrot, ["one {prompt}"], lambda piece: None, seed=0, chat=False)
    assert parrot.heard == [("one {prompt}\n=", 0, 256)]


def test_a_conversation_remembers_and_forgets(chatting, capsys):
    parrot = Parrot(chatting, "yes")
    chat.run_chat(parrot, ["one", "two"], lambda piece: None, seed=0, chat=True)
    assert [text for text, _, _ in parrot.heard] == ["<u>one<a>", "<u>one<a>yes<u>two<a>"]
    assert parrot.heard[0][2] is None  # the format has its own beginning
    short = Parrot(chatting, "yes", room=20)  # the second has 21 bytes
    chat.run_chat(short, ["one", "two"], lambda piece: None, seed=0, chat=True)
    assert [text for text, _, _ in short.heard] == ["<u>one<a>", "<u>two<a>"]
    tight = Parrot(chatting, "yes", room=8)  # the last message stays, and is cut with a note
    chat.run_chat(tight, ["one"], lambda piece: None, seed=0, chat=True)
    assert tight.heard[0][0] == "<u>one<a>"
    assert (
        "1 of 1 prompts has more than 8 tokens (--prompt-length of the run) and lost its beginning"
        in capsys.readouterr().err
    )
    with pytest.raises(
        UserError,
        match="a turn of one word has 7 tokens, but the run was trained on prompts of at most 6",
    ):
        chat.run_chat(
            Parrot(chatting, "yes", room=6), ["one"], lambda piece: None, seed=0, chat=True
        )


def test_a_conversation_needs_a_chat_template(loaded):
    parrot = Parrot(byte_tokenizer(), "yes")
    with pytest.raises(UserError, match="no chat template"):  # before a line is asked for
        chat.run_chat(
            parrot, iter(lambda: pytest.fail("asked"), None), lambda piece: None, seed=0, chat=True
        )


def test_an_interrupt_ends_one_response_only(loaded):
    class Slow(Parrot):
        def __call__(self, text, **options):
            yield from super().__call__(text, **options)
            raise KeyboardInterrupt

    said: list[str] = []
    chat.run_chat(Slow(byte_tokenizer(), "ab"), ["one", "two"], said.append, seed=0, chat=False)
    assert "".join(said) == "ab\nab\n"


def test_lines_typed_and_shown(monkeypatch, capsys):
    lines = iter(["one", "two"])
    monkeypatch.setattr(
        "builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError)
    )
    assert list(chat.typed_lines()) == ["one", "two"]
    capsys.readouterr()
    chat.show("a\x1b[2J\nb\t")
    assert capsys.readouterr().out == "a\\x1b[2J\nb "
