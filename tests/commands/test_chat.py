from dataclasses import replace

import pytest
from runs import RUN, TEXTS

from jaxppo.commands import chat
from jaxppo.errors import UserError
from jaxppo.pretrained.tiny import byte_tokenizer


def test_an_answer_is_the_samplers(loaded, read, moved, prompts):
    answer = chat.make_answer(*loaded, moved)
    assert answer(TEXTS[0], seed=3) == read(moved, prompts, seed=3)[0].response


class Parrot:
    """Always gives the same answer, and records its prompts."""

    def __init__(self, tokenizer, answer: str, room: int = 1000):
        self.tokenizer, self.answer, self.heard = tokenizer, answer, []
        self.config = replace(RUN, prompt_length=room)

    def __call__(self, text, *, seed, start=None):
        self.heard.append((text, seed, start))
        return self.answer


def talk(parrot, lines, write=lambda text: None, **options):
    chat.run_chat(parrot.config, parrot.tokenizer, parrot, lines, write, seed=0, **options)


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
    talk(parrot, ["one", " ", "two"], said.append, chat=False)
    assert said == ["ö!\n", "ö!\n"]
    assert parrot.heard == [
        ("one", 0, None),
        ("two", 1, None),
    ]  # a blank line is no prompt; the noise depends on the line


def test_a_prompt_has_the_format_of_training(loaded):
    """With the token that starts a document where the run's prompts had it, and in the run's
    format.
    """
    parrot = Parrot(byte_tokenizer(), "!")
    parrot.config = replace(parrot.config, prompt_start=True, prompt_format="{prompt}\n=")
    talk(parrot, ["one {prompt}"], chat=False)
    assert parrot.heard == [("one {prompt}\n=", 0, 256)]


def test_a_conversation_remembers_and_forgets(chatting, capsys):
    parrot = Parrot(chatting, "yes")
    talk(parrot, ["one", "two"], chat=True)
    assert [text for text, _, _ in parrot.heard] == ["<u>one<a>", "<u>one<a>yes<u>two<a>"]
    assert parrot.heard[0][2] is None  # the format has its own beginning
    short = Parrot(chatting, "yes", room=20)  # the second has 21 bytes
    talk(short, ["one", "two"], chat=True)
    assert [text for text, _, _ in short.heard] == ["<u>one<a>", "<u>two<a>"]
    tight = Parrot(chatting, "yes", room=8)  # the last message stays, and is cut with a note
    talk(tight, ["one"], chat=True)
    assert tight.heard[0][0] == "<u>one<a>"
    assert (
        "1 of 1 prompts has more than 8 tokens (--prompt-length of the run) and lost its beginning"
        in capsys.readouterr().err
    )
    with pytest.raises(
        UserError,
        match="a turn of one word has 7 tokens, but the run was trained on prompts of at most 6",
    ):
        talk(Parrot(chatting, "yes", room=6), ["one"], chat=True)


def test_a_conversation_needs_a_chat_template(loaded):
    parrot = Parrot(byte_tokenizer(), "yes")
    with pytest.raises(UserError, match="no chat template"):  # before a line is asked for
        talk(parrot, iter(lambda: pytest.fail("asked"), None), chat=True)


def test_an_interrupt_ends_one_response_only(loaded):
    class Slow(Parrot):
        def __call__(self, text, **options):
            raise KeyboardInterrupt

    said: list[str] = []
    talk(Slow(byte_tokenizer(), "ab"), ["one", "two"], said.append, chat=False)
    assert said == ["\n", "\n"]


def test_lines_typed_and_shown(monkeypatch, capsys):
    lines = iter(["one", "two"])
    monkeypatch.setattr(
        "builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError)
    )
    assert list(chat.typed_lines()) == ["one", "two"]
    capsys.readouterr()
    chat.show("a\x1b[2J\nb\t")
    assert capsys.readouterr().out == "a\\x1b[2J\nb "
