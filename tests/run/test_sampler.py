from dataclasses import replace

import jax
import pytest
from runs import RUN, TEXTS

from jaxppo import ppo
from jaxppo.commands import sample
from jaxppo.data.prompts import PromptSet, encode
from jaxppo.errors import UserError
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.run import load, sampler


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


def test_sampler_takes_any_number_of_prompts(read, moved, prompts):
    seven = read(moved, prompts, seed=0)
    assert [sample.prompt for sample in seven] == ["one", "two", "four", "x", "even", "it", "ab"]
    assert all(1 <= len(sample.tokens) <= 3 for sample in seven)
    five = read(moved, PromptSet(prompts.tokens[:5], prompts.mask[:5]), seed=0)
    assert five == seven[:5]  # what fills up the last part changes nothing
    assert read(moved, prompts, seed=0) == seven
    assert read(moved, prompts, seed=1) != seven


def test_kl_of_samples_is_to_the_base(read, moved, prompts, loaded):
    assert any(abs(sample.kl) > 1e-4 for sample in read(moved, prompts, seed=0))
    fresh = moved.replace(params=loaded[1].params)  # adapters as they were made: nothing added
    assert all(abs(sample.kl) < 1e-4 for sample in read(fresh, prompts, seed=0))


def test_parts_come_one_after_the_other(read, moved, prompts):
    parts = list(read.batches(moved, prompts, seed=0))
    assert [len(part) for part in parts] == [4, 3]
    assert [sample for part in parts for sample in part] == read(moved, prompts, seed=0)


@pytest.fixture(scope="module")
def stream(loaded, moved):
    config, policy = loaded
    return sample.Stream(config, policy, moved)


def test_a_stream_gives_what_the_sampler_gives(stream, read, moved, prompts):
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


def test_a_stream_ends_at_the_end_of_text(loaded, moved):
    """Each id is made the end of text in turn: it is the last one that comes."""
    config, policy = loaded
    first = list(sample.Stream(config, policy, moved, greedy=True)("ab", seed=0))
    assert len(first) == 3  # --response-length, no end of text among them
    cut = sample.Stream(replace(config, eos=first[1]), policy, moved, greedy=True)("ab", seed=0)
    assert list(cut) == first[: first.index(first[1]) + 1]


def test_narrowed_settings():
    settings = replace(RUN, response_length=10, temperature=0.5)
    same = sample.narrowed(settings, temperature=None, max_tokens=None)
    assert same == settings
    other = sample.narrowed(settings, temperature=2.0, max_tokens=4)
    assert (other.temperature, other.response_length) == (2.0, 4)
    assert (
        sample.narrowed(settings, temperature=0.0, max_tokens=10).temperature == 0.5
    )  # the sampler is greedy then
    for tokens in (11, 0, -1):
        with pytest.raises(
            UserError, match=f"--max-tokens {tokens}: .* at most 10 tokens; give 1 to 10"
        ):
            sample.narrowed(settings, temperature=None, max_tokens=tokens)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--temperature must be 0 or"):
            sample.narrowed(settings, temperature=temperature, max_tokens=None)


def test_fewer_tokens_are_the_first_of_more(loaded, moved, prompts):
    config, policy = loaded
    short = sampler.Sampler(sample.narrowed(config, temperature=None, max_tokens=2), policy, rows=4)
    whole = sampler.Sampler(config, policy, rows=4)
    for one, other in zip(
        short(moved, prompts, seed=0), whole(moved, prompts, seed=0), strict=True
    ):
        assert one.tokens == other.tokens[:2]


def test_pieces_hold_back_half_a_character(loaded):
    """€ is three bytes, 🙂 four; with one id for each byte nothing shows before the last one."""
    tokenizer = loaded[1].tokenizer
    text = "a€ 🙂b"
    assert list(sample.pieces(tokenizer, tokenizer.encode(text))) == ["a", "€", " ", "🙂", "b"]
    broken = tokenizer.encode("€")[:2] + tokenizer.encode(
        "x"
    )  # never finished: shown once something follows
    assert list(sample.pieces(tokenizer, broken)) == ["\ufffdx"]
    assert list(sample.pieces(tokenizer, tokenizer.encode("a") + tokenizer.encode("€")[:2])) == [
        "a",
        "\ufffd",
    ]
    assert list(sample.pieces(tokenizer, [tokenizer.eos_id])) == []


class Parrot(sample.Stream):
    """A stream that says an answer to whatever it hears, and writes down what that was."""

    def __init__(self, tokenizer, answer: str, room: int = 1000):
        self.tokenizer, self.answer, self.heard = tokenizer, answer, []
        self.config = replace(RUN, prompt_length=room)

    def __call__(self, text, *, seed, index=0, start=None):
        self.heard.append((text, index, start))
        yield from self.tokenizer.encode(self.answer)


@pytest.fixture
def chatting(loaded):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    return tokenizer


def test_a_line_is_a_prompt(loaded):
    parrot, said = Parrot(byte_tokenizer(), "ö!"), []
    sample.converse(parrot, ["one", " ", "two"], said.append, seed=0, chat=False)
    assert said == ["ö", "!", "\n", "ö", "!", "\n"]
    assert parrot.heard == [
        ("one", 0, None),
        ("two", 1, None),
    ]  # a blank line is none; noise of its own for each


def test_a_prompt_is_put_as_in_training(loaded):
    """With the token that starts a document where the run's prompts had it, and in the run's
    format.
    """
    parrot = Parrot(byte_tokenizer(), "!")
    parrot.config = replace(parrot.config, prompt_start=True, prompt_format="{prompt}\n=")
    sample.converse(parrot, ["one {prompt}"], lambda piece: None, seed=0, chat=False)
    assert parrot.heard == [("one {prompt}\n=", 0, 256)]


def test_a_conversation_remembers_and_forgets(chatting, capsys):
    parrot = Parrot(chatting, "yes")
    sample.converse(parrot, ["one", "two"], lambda piece: None, seed=0, chat=True)
    assert [text for text, _, _ in parrot.heard] == ["<u>one<a>", "<u>one<a>yes<u>two<a>"]
    assert parrot.heard[0][2] is None  # the format has its own beginning
    short = Parrot(chatting, "yes", room=20)  # the second has 21 bytes
    sample.converse(short, ["one", "two"], lambda piece: None, seed=0, chat=True)
    assert [text for text, _, _ in short.heard] == ["<u>one<a>", "<u>two<a>"]
    tight = Parrot(chatting, "yes", room=8)  # the last message stays, and is cut with a note
    sample.converse(tight, ["one"], lambda piece: None, seed=0, chat=True)
    assert tight.heard[0][0] == "<u>one<a>"
    assert (
        "1 of 1 prompts has more than 8 tokens (--prompt-length of the run) and lost its beginning"
        in capsys.readouterr().err
    )
    with pytest.raises(
        UserError,
        match="a turn of one word has 7 tokens, but the run was trained on prompts of at most 6",
    ):
        sample.converse(
            Parrot(chatting, "yes", room=6), ["one"], lambda piece: None, seed=0, chat=True
        )


def test_a_conversation_needs_a_format(loaded):
    parrot = Parrot(byte_tokenizer(), "yes")
    with pytest.raises(UserError, match="no chat template"):  # before a line is asked for
        sample.converse(
            parrot, iter(lambda: pytest.fail("asked"), None), lambda piece: None, seed=0, chat=True
        )


def test_an_interrupted_response_ends_alone(loaded):
    class Slow(Parrot):
        def __call__(self, text, **options):
            yield from super().__call__(text, **options)
            raise KeyboardInterrupt

    said: list[str] = []
    sample.converse(Slow(byte_tokenizer(), "ab"), ["one", "two"], said.append, seed=0, chat=False)
    assert "".join(said) == "ab\nab\n"


def test_lines_typed_and_shown(monkeypatch, capsys):
    lines = iter(["one", "two"])
    monkeypatch.setattr(
        "builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError)
    )
    assert list(sample.typed()) == ["one", "two"]
    capsys.readouterr()
    sample.show("a\x1b[2J\nb\t")
    assert capsys.readouterr().out == "a\\x1b[2J\nb "
