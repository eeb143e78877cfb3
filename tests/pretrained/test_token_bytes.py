import itertools

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from jaxppo.errors import UserError
from jaxppo.pretrained import token_bytes
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.pretrained.tokenizer import END, Tokenizer, byte_level
from jaxppo.pretrained.vocabulary import train_bpe, train_words

SENTENCEPIECE = ["<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁a", "b", "▁", "é"]


def tokenizer_of(tokens: list[str], decoder=None, special: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer with these tokens, the first of which ends the text."""
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=END))
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend, eos_id=0)


def written(tokenizer: Tokenizer, **options) -> list[bytes]:
    table, length = token_bytes.make_table(tokenizer, **options)
    return [bytes(row[:n]) for row, n in zip(table, length, strict=True)]


def ends(stops, ids) -> list[bool]:
    """Whether each of these tokens completes a stop text."""
    state, found = 0, []
    for token in ids:
        column = int(stops.column[token])
        found.append(bool(stops.ends[state, column]))
        state = int(stops.next[state, column])
    return found


def test_tokens_of_bytes_write_what_gpt2s_spelling_says():
    """An added token with a space has no such spelling."""
    tokenizer = tokenizer_of(["Ġthe", "Ċ", "Ã", "©", "a b"], decoders.ByteLevel())
    assert written(tokenizer) == [b" the", b"\n", b"\xc3", b"\xa9", b"a b"]
    assert tokenizer.decode(range(5)) == " the\né" + "a b"


def test_every_byte_has_a_token():
    tokenizer = byte_tokenizer()
    assert sorted(written(tokenizer)[:256]) == [bytes([i]) for i in range(256)]


@pytest.mark.parametrize("text", ["hello wörld\n\t €🙂", "naïve – 漢字"])
def test_a_text_is_the_bytes_of_its_tokens(text):
    tokenizer = train_bpe(["hello world", "naïve –", "wörld"] * 3, 290)
    table = written(tokenizer)
    assert b"".join(table[i] for i in tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (
            decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            ),
            [b"\n", b"\xc3", b"\xa9", b" a", b"b", b" ", "é".encode()],
        ),
        (decoders.Metaspace(), [b"<0x0A>", b"<0xC3>", b"<0xA9>", b" a", b"b", b" ", "é".encode()]),
    ],
)
def test_sentencepiece_tokens_keep_their_space(decoder, expected):
    """Though a text that begins with one is decoded without it."""
    tokenizer = tokenizer_of(SENTENCEPIECE, decoder, special=("<s>", "</s>"))
    assert tokenizer.decode([5]) == "a"
    assert written(tokenizer) == [b"", b"", *expected]


def test_words_have_a_space_before_them():
    assert written(tokenizer_of(["a", "b"])) == [b" a", b" b"]  # no decoder: joined with spaces
    tokenizer = train_words(["the film was good ."])
    found = dict(zip(map(tokenizer.token, range(7)), written(tokenizer), strict=True))
    assert (found["film"], found["."], found[END]) == (b" film", b".", b"")


def test_special_tokens_write_nothing_or_their_name():
    tokenizer = byte_tokenizer()
    assert written(tokenizer)[256] == b""
    assert written(tokenizer, skip_special=False)[256] == b"<|endoftext|>"


def test_ids_that_only_the_model_has_write_nothing():
    assert written(tokenizer_of(["Ġa", "b"], decoders.ByteLevel()), vocab_size=4) == [
        b" a",
        b"b",
        b"",
        b"",
    ]


def test_a_stop_text_over_several_tokens_that_ends_inside_one():
    """`</a>` is in `b</`, `a`, `>\\n`, and its end in the middle of the third."""
    tokenizer = tokenizer_of(["<|e|>", "b</", "a", ">Ċ", "</", "<"], decoders.ByteLevel())
    stops = token_bytes.make_stops(["</a>"], tokenizer, vocab_size=6)
    assert ends(stops, [2, 1, 2, 3]) == [False, False, False, True]
    assert ends(stops, [1, 2, 2, 3]) == [False] * 4
    assert ends(stops, [5, 4, 2, 3]) == [False, False, False, True]  # `<` and then the text
    assert stops.next.shape[0] == 5  # "", <, </, </a, </a>


def test_several_stop_texts_with_common_parts():
    """`bc` ends inside of `abcd`, whose beginning is being followed; a text is found again."""
    tokenizer = tokenizer_of(["a", "b", "c", "d", "xbcx"], decoders.ByteLevel())
    stops = token_bytes.make_stops(["abcd", "bc", "dd"], tokenizer, vocab_size=5)
    #                     a  b  c  d  d  d  xbcx
    assert ends(stops, [0, 1, 2, 3, 3, 3, 4]) == [False, False, True, True, True, True, True]
    assert ends(stops, [0, 1, 3, 0, 1, 2]) == [False] * 5 + [True]


def test_a_stop_text_against_a_search_in_the_text():
    rng = np.random.default_rng(0)
    tokens = ["a", "b", "ab", "ba", "aab", "Ġ", "Ã", "©", "b©"]
    tokenizer = tokenizer_of(tokens, decoders.ByteLevel())
    table, texts = written(tokenizer), ["aba", "é", "b b", "aabaab"]
    stops = token_bytes.make_stops(texts, tokenizer, vocab_size=9)
    for _ in range(200):
        ids = rng.integers(0, 9, 12)
        whole = [b"".join(table[i] for i in ids[: n + 1]) for n in range(12)]
        count = lambda x: sum(x[i:].startswith(t.encode()) for t in texts for i in range(len(x)))
        counts = [0, *map(count, whole)]
        assert ends(stops, ids) == [b > a for a, b in itertools.pairwise(counts)]


def test_tokens_that_act_alike_share_a_column():
    """States: nothing, `Q`, `Q:`. Columns: `Q`, `:`, all other tokens, ids that write nothing."""
    stops = token_bytes.make_stops(["Q:"], byte_tokenizer(), vocab_size=300)
    assert stops.column.shape == (300,) and stops.next.shape == stops.ends.shape == (3, 4)


def test_a_special_token_is_found_by_its_name():
    backend = byte_level(models.BPE({"a": 0}, []), special=[END, "<|im_end|>"])
    stops = token_bytes.make_stops(["<|im_end|>"], Tokenizer(backend, eos_id=1), vocab_size=3)
    assert ends(stops, [0, 2]) == [False, True]


def test_a_text_that_the_tokenizer_cannot_write():
    words = train_words(["q : the film"])
    assert token_bytes.make_stops(["q :"], words, vocab_size=words.vocab_size).ends.any()
    with pytest.raises(UserError, match="--stop 'Q :': the tokenizer cannot write this text"):
        token_bytes.make_stops(["film", "Q :"], words, vocab_size=words.vocab_size)
    with pytest.raises(UserError, match=r"--stop '\\n'"):
        token_bytes.make_stops(["\n"], words, vocab_size=words.vocab_size)
