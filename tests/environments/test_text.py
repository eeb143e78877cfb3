"""Text environments: rows, tables, and what tokens make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from jaxppo.environments import strings, text
from jaxppo.errors import UserError
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.pretrained.vocabulary import train_bpe
from jaxppo.types import Turn

WORDS = [b"", b"a", b"b", b"ab", b"\n", b"banana", b"a", b"?"]
TABLES = text.tables_of(WORDS)


def echo(reply_length=4, max_turns=3, alphabet=b"ab\n?"):
    """Answers what it read, with the number of bytes as the reward."""

    def step(state, said, key, turn):
        reward = said.length.astype(jnp.float32)
        return state + 1, text.Answer(said, reward, said.bytes[0] == ord("b"))

    return text.from_rows(
        lambda instance: instance["count"],
        step,
        max_turns=max_turns,
        turn_length=6,
        reply_length=reply_length,
        alphabet=alphabet,
    )


def start(environment, rows=1):
    keys = jax.random.split(jax.random.key(0), rows)
    return environment.reset({"count": jnp.zeros(rows, jnp.int32)}, keys)


def turn(*rows: list[int]) -> Turn:
    width = max(1, *map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return Turn(jnp.asarray(tokens), jnp.array([len(ids) for ids in rows]))


decode = jax.jit(lambda tokens, length: text.decode(TABLES, tokens, length, 7))


@given(st.lists(st.integers(0, 7), min_size=5, max_size=5), st.integers(0, 5))
def test_tokens_as_bytes(ids, length):
    """Only the first `length` tokens count, and seven bytes."""
    found, size = decode(jnp.array([ids]), jnp.array([length]))
    expected = b"".join(WORDS[i] for i in ids[:length])[:7]
    assert size == len(expected)
    assert bytes(np.asarray(found[0])) == expected.ljust(7, b"\0")


def test_the_token_of_a_byte():
    """The first one that writes it alone, unless it is rare."""
    assert [int(TABLES.token[byte]) for byte in b"ab\nz"] == [1, 2, 4, -1]
    assert text.tables_of(WORDS, rare=[1]).token[ord("a")] == 6
    assert text.tables_of(WORDS, rare=[2]).token[ord("b")] == 2


def test_a_tokenizer_over_bytes_reads_and_writes_every_text():
    tokenizer = train_bpe(["hello world"] * 3, 280)
    tables = text.make_tables(tokenizer, vocab_size=300)
    assert tables.length.shape == (300,) and (np.asarray(tables.token) >= 0).all()
    ids = [*tokenizer.encode("hello wörld\n"), tokenizer.eos_id, 299]
    found, size = text.decode(tables, jnp.array([ids]), jnp.array([len(ids)]), 20)
    assert bytes(np.asarray(found[0, : int(size[0])])).decode() == "hello wörld\n"
    assert tokenizer.decode(tables.token[np.frombuffer(b"higher\n", np.uint8)]) == "higher\n"


def test_letters_are_preferred_to_byte_fallback():
    tokens = ["</s>", "<0x41>", "A", "<0x0A>", "▁"]
    backend = Backend(models.WordLevel({x: i for i, x in enumerate(tokens)}, unk_token="</s>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    tables = text.make_tables(Tokenizer(backend, eos_id=0))
    assert [int(tables.token[byte]) for byte in b"A\n B"] == [2, 3, 4, -1]


def test_an_end_of_text_that_is_not_special_writes_nothing():
    backend = Backend(models.WordLevel({"$": 0, "a": 1}, unk_token="$"))
    backend.decoder = decoders.Fuse()
    tables = text.make_tables(Tokenizer(backend, eos_id=0))
    assert tables.length.tolist() == [0, 1] and tables.token[ord("$")] == -1


def test_a_vocabulary_without_a_letter_of_the_replies():
    with pytest.raises(UserError, match=r"writes the bytes b'xz', but no token"):
        text.on_bytes(echo(alphabet=b"axz"), TABLES)


@pytest.mark.ci
def test_replies_as_tokens_stand_on_the_right():
    world = text.on_bytes(echo(), TABLES, turn_length=5)
    assert world[2:] == (3, 5, 4) and world.length == 3 * (5 + 4)
    state, seen = world.step(start(world, 2), turn([3, 4], [1]))  # "ab\n", "a"
    assert seen.tokens[0, 1:].tolist() == [1, 2, 4] and seen.length.tolist() == [3, 1]
    assert seen.tokens[1, 3] == 1
    assert seen.reward.tolist() == [3, 1] and not seen.done.any()


def test_the_policy_always_has_something_to_read():
    """An empty reply becomes a newline, or the first byte of the alphabet; at the end nothing."""
    for alphabet, token in ((b"ab\n", 4), (b"ab", 1)):
        world = text.on_bytes(echo(alphabet=alphabet), TABLES)
        _, seen = world.step(start(world, 2), turn([0], [2]))
        assert seen.length.tolist() == [1, 0] and seen.tokens[0, -1] == token
        assert seen.done.tolist() == [False, True]


@pytest.mark.ci
@pytest.mark.parametrize(("alphabet", "token"), [(b"a\n?", 7), (b"a\n", 1)])
def test_a_byte_outside_the_alphabet_becomes_a_question_mark(alphabet, token):
    world = text.on_bytes(echo(alphabet=alphabet), TABLES)
    _, seen = world.step(start(world), turn([1, 2]))  # "ab"
    assert seen.tokens[0, 2:].tolist() == [1, token]


def test_a_reply_is_cut():
    """ "banana" has six bytes, of which four are answered; five are rewarded with the stop."""
    world = text.on_bytes(echo(), TABLES)
    state = start(world)
    _, seen = world.step(state, turn([1, 5]))
    assert seen.length == 4 and seen.tokens.tolist() == [[1, 2, 1, 7]]  # "aban": n is unknown
    assert seen.reward == 6  # bytes that were read


def test_the_end_of_an_episode_is_final():
    """Then nothing changes, whatever is written."""
    world = echo()
    state = start(world, 2)
    state, reply = world.step(state, *_said("b", "a"))
    assert reply.done.tolist() == [True, False]
    state, reply = world.step(state, *_said("aaa", "aaa"))
    assert state.own.tolist() == [1, 2] and state.turn.tolist() == [1, 2]
    assert reply.length.tolist() == [0, 3] and reply.reward.tolist() == [0, 3]
    assert reply.done.tolist() == [True, False]
    _, reply = world.step(state, *_said("a", "a"))
    assert reply.done.all()  # max_turns


def test_bytes_behind_a_length_are_not_read():
    """And lengths outside the turn are the nearest possible ones."""
    world = echo(reply_length=8)
    said = jnp.full((3, 6), ord("a"), jnp.uint8)
    _, reply = world.step(start(world, 3), said, jnp.array([2, -5, 99]))
    assert reply.length.tolist() == [2, 0, 6]
    assert bytes(np.asarray(reply.text[0])) == b"aa" + b"\0" * 6


def test_every_row_and_turn_has_its_own_key():
    def step(state, said, key, turn):
        return state, text.Answer(strings.string("a"), jax.random.uniform(key), False)

    world = text.from_rows(
        lambda instance: instance["count"], step, max_turns=3, turn_length=1, reply_length=1
    )
    state, rewards = start(world, 3), []
    for _ in range(3):
        state, reply = world.step(state, *_said("a", "a", "a", width=1))
        rewards += reply.reward.tolist()
    assert len(set(rewards)) == 9


def test_instances_in_arrays():
    rows = [{"prompt": "p", "x": np.int32(i), "y": np.zeros(2)} for i in range(3)]
    stacked = text.stack(rows)
    assert sorted(stacked) == ["x", "y"] and stacked["y"].shape == (3, 2)
    assert stacked["x"].tolist() == [0, 1, 2] and stacked["x"].dtype == np.int32


def _said(*texts: str, width: int = 6):
    rows = [strings.string(x, width) for x in texts]
    return jnp.stack([x.bytes for x in rows]), jnp.stack([x.length for x in rows])


def test_the_tables_of_every_byte():
    tables = text.make_tables(byte_tokenizer())
    assert sorted(tables.token.tolist()) == list(range(256)) and tables.length.sum() == 256
