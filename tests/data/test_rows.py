from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxppo.config import RunConfig
from jaxppo.data import rows
from jaxppo.data.prompts import PromptSet
from jaxppo.errors import UserError
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.pretrained.vocabulary import train_bpe

CONFIG = RunConfig(batch_size=4)


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_rows_are_padded_on_the_left():
    made = rows.from_ids([[1, 2], [3, 4, 5, 6]], 3, learned=[1, 2])
    assert made.tokens.tolist() == [[0, 1, 2], [4, 5, 6]]  # the end of a row that is too long
    assert made.mask.tolist() == [[False, True, True], [True, True, True]]
    assert made.extra["weight"].tolist() == [[0, 0, 1], [0, 1, 1]]
    with pytest.raises(UserError, match="text 2 has no tokens"):
        rows.from_ids([[1], []], 3)


def test_packed_text_is_one_stream():
    made = rows.pack(["ab", "c", "def"], encode, 4, eos=0)
    a, b, c, d, e, f = range(97, 103)
    assert made.tokens.tolist() == [[a, b, 0, c], [0, d, e, f]]  # the last end is dropped
    assert made.mask.all() and made.extra["weight"].all()
    with pytest.raises(UserError, match="the texts have 2 tokens, too few for one row of 4"):
        rows.pack(["a"], encode, 4, eos=0)


def test_every_packed_text_has_a_start():
    made = lambda texts, start: rows.pack(texts, encode, 3, eos=0, start=start).tokens.tolist()
    assert made(["a", "b"], 7) == [[7, 97, 0], [7, 98, 0]]
    assert made(["\7a", "b"], 7) == [[7, 97, 0], [7, 98, 0]]  # a text may have its own
    # an end of text that also starts one is not there twice: 0 a 0 b 0
    assert made(["a", "b"], 0) == [[0, 97, 0]]
    assert made(["a", "bc"], 0) == [[0, 97, 0], [98, 99, 0]]


def test_only_responses_have_weight():
    made = rows.responses([("ab", "c"), ("abcd", "efghij")], encode, 5, eos=0)
    # the second response is cut, and has no end to learn
    assert made.tokens.tolist() == [[0, 97, 98, 99, 0], [100, 101, 102, 103, 104]]
    assert made.extra["weight"].tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    # with the end of text where there is room
    made = rows.responses([("abcd", "efghij"), ("abcd", "ef")], encode, 5, eos=0, longest=3)
    assert made.tokens.tolist() == [[99, 100, 101, 102, 103], [99, 100, 101, 102, 0]]
    assert made.extra["weight"].sum() == 6


TEXTS = ["The film is good, and the music is good.", "film= good \nfilm: bad  x", "é = 12"]
SPACES = {
    "metaspace": lambda: (pre_tokenizers.Metaspace(), None, decoders.Metaspace()),
    "prepended": lambda: (  # as in Llama 2
        None,
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    ),
}


def sentencepiece(kind: str) -> Tokenizer:
    """Byte pairs with a space before every text."""
    backend = tokenizers.Tokenizer(models.BPE())
    pre, normalizer, decoder = SPACES[kind]()
    if pre is not None:
        backend.pre_tokenizer = pre
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoder
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return Tokenizer(backend, eos_id=0)


@pytest.mark.parametrize("kind", ["bytes", *SPACES])
@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("film=", "good"),  # no space between them
        ("film=", " good"),  # and one, not two
        ("The film is", " good, and the music"),
        ("film:", " \nfilm"),
        ("film=", "= film"),
        ("film", "\n"),
    ],
)
def test_a_row_is_the_prompt_and_the_response(kind, prompt, response):
    """Nothing between them but what they hold, whatever the tokenizer puts before a text."""
    tokenizer = train_bpe(TEXTS, 300) if kind == "bytes" else sentencepiece(kind)
    made = rows.responses([(prompt, response)], tokenizer.encode, 32, eos=tokenizer.eos_id)
    own = made.tokens[0][made.mask[0]].tolist()
    assert tokenizer.decode(own) == prompt + response
    # the prompt's tokens are those of a rollout
    learned = made.extra["weight"][0][made.mask[0]] > 0
    assert [x for x, y in zip(own, learned) if not y] == tokenizer.encode(prompt)


def test_responses_with_a_start_token():
    made = rows.responses([("ab", "c"), ("abcd", "ef")], encode, 5, eos=0, start=7)
    # the prompt is cut, the start is not
    assert made.tokens.tolist() == [[7, 97, 98, 99, 0], [7, 100, 101, 102, 0]]
    assert made.extra["weight"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    assert rows.responses(
        [("ab", "cdefg")], encode, 3, eos=0, start=7, longest=3
    ).tokens.tolist() == [[99, 100, 101]]


def test_preferences_are_rows_in_pairs():
    made = rows.preferences([("a", "b", "c"), ("d", "e", "f"), ("g", "h", "i")], encode, 3, eos=0)
    assert made.tokens[:, 1].tolist() == [98, 99, 101, 102, 104, 105] and len(made) == 3
    batch = made.batch(CONFIG, 0)
    # better and worse are adjacent
    assert all(b - a == 1 for a, b in batch.tokens[:, 1].reshape(2, 2))
    with pytest.raises(UserError, match="--batch-size 3 must be even"):
        made.batch(replace(CONFIG, batch_size=3), 0)
    assert made.take(np.array([2])).tokens[:, 1].tolist() == [104, 105]


def test_both_responses_of_a_pair_are_cut_to_the_same_length():
    """A policy's response of 2 tokens without an end, and a real one of 4 with its end: cut to 2
    tokens, neither has an end.
    """
    made = rows.preferences([("ab", "cdef", "cd")], encode, 6, eos=0, longest=2)
    assert made.tokens.tolist() == [[0, 0, 97, 98, 99, 100]] * 2
    ended = rows.preferences([("abcdefgh", "c", "d")], encode, 6, eos=0, longest=2)
    # 4 tokens of prompt, as in a run
    assert ended.tokens.tolist() == [[101, 102, 103, 104, 99, 0], [101, 102, 103, 104, 100, 0]]
    shorter = rows.responses([("abcdefgh", "")], encode, 6, eos=0, longest=2)
    assert shorter.mask.sum() == 5  # and no fifth where the response leaves room


def test_every_row_once_an_epoch_from_the_cursor_alone():
    made = rows.from_ids([[i + 1] for i in range(8)], 2)
    seen = [made.batch(CONFIG, cursor).tokens[:, 1].tolist() for cursor in (0, 4, 8, 12)]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(1, 9))
    assert seen[0] != seen[2]
    assert made.batch(CONFIG, 4).tokens[:, 1].tolist() == seen[1]
    two = made.batches(replace(CONFIG, steps_per_call=2), 0)
    assert two.tokens.shape == two.extra["weight"].shape == (2, 4, 2)
    assert two.tokens[:, :, 1].tolist() == seen[:2]


def test_buckets_make_short_batches():
    """16 rows of length 1 to 16: four batches of widths 4, 8, 16 and 16."""
    made = replace(rows.from_ids([[9] * n for n in range(1, 17)], 16), buckets=4)
    batches = [made.batch(CONFIG, cursor) for cursor in (0, 4, 8, 12)]
    assert sorted(batch.tokens.shape[1] for batch in batches) == [4, 8, 16, 16]
    assert sorted(n for batch in batches for n in batch.mask.sum(1)) == list(range(1, 17))
    for batch in batches:
        assert batch.extra["weight"].shape == batch.tokens.shape and (batch.mask[:, -1]).all()
    with pytest.raises(UserError, match="--buckets 1"):
        made.batches(replace(CONFIG, steps_per_call=2), 0)


def test_recordings_are_not_cut_with_the_tokens():
    """Rows of 1 to 4 tokens make batches of width 2 and 4; recordings keep their eight frames."""
    features = np.arange(4 * 8 * 2, dtype=np.float32).reshape(4, 8, 2)
    made = rows.from_ids(
        [[9] * n for n in range(1, 5)], 8, context=features, context_length=np.full(4, 8)
    )
    made = replace(made, buckets=2)
    batches = [made.batch(CONFIG, cursor) for cursor in (0, 4)]
    assert sorted(batch.extra["weight"].shape for batch in batches) == [(4, 2), (4, 4)]
    for batch in batches:
        np.testing.assert_array_equal(batch.extra["context"], features[batch.mask.sum(1) - 1])
    assert made.take(np.array([2])).extra["context"].tolist() == features[2:3].tolist()


def test_data_are_told_apart_by_their_hash():
    """By tokens, masks, every entry of extra and their order; not by how batches are drawn."""
    ids = [[1, 2], [3, 4], [5, 6]]
    made = rows.from_ids(ids, 3)
    own = rows.identity(made)
    assert len(own) == 16 and own == rows.identity(rows.from_ids(ids, 3))
    assert own == rows.identity(replace(made, buckets=2))
    others = [
        rows.from_ids([[1, 2], [3, 4], [5, 7]], 3),
        rows.from_ids(ids[::-1], 3),
        rows.from_ids(ids, 4),
        rows.from_ids(ids, 3, learned=[1, 1, 1]),
        rows.from_ids(ids, 3, label=np.zeros(3, np.float32)),
        rows.from_ids(ids, 3, label=np.ones(3, np.float32)),
        PromptSet(made.tokens, made.mask),
        PromptSet(made.tokens, made.mask, columns="ab"),
        rows.NoisyRows(["a", "b"], np.zeros(2, np.float32), encode, 3, 0),
        rows.NoisyRows(["ab"], np.zeros(2, np.float32), encode, 3, 0),
    ]
    assert len({own, *map(rows.identity, others)}) == 1 + len(others)


def test_data_of_another_class_have_no_hash():
    class Mine:
        def batches(self, config, cursor):
            raise NotImplementedError

    assert rows.identity(Mine()) == ""


def test_labels():
    made = rows.labelled(["ab", "c"], np.array([1.0, 0.0]), encode, 4, eos=0)
    batch = made.batch(replace(CONFIG, batch_size=2), 0)
    assert batch.extra["label"].tolist() == [float(row[2] == 98) for row in batch.tokens]


def test_copies_go_to_the_same_side_of_a_split():
    texts = [f"text {i}" for i in range(1000)]
    training, validation = rows.train_validation_split(texts, 0.2)
    assert len(training) + len(validation) == 1000
    assert abs(len(validation) - 200) < 45  # 3.5 standard deviations of 12.6
    assert rows.train_validation_split([*texts, "TEXT  3"], 0.2)[1] in (
        validation,
        [*validation, 1000],
    )
    copies = rows.train_validation_split(["a b", "A  b", *texts], 0.5)
    assert {0, 1} <= set(copies[0]) or {0, 1} <= set(copies[1])


def test_too_few_texts_to_split():
    with pytest.raises(
        UserError, match="12 texts are too few to hold 10% of them out; give 50 or more"
    ):
        rows.train_validation_split([f"prompt {i}" for i in range(12)], 0.1)


def test_noise_on_words():
    rng = np.random.default_rng(0)
    text = " ".join(str(i) for i in range(1000))
    dropped = rows.add_word_noise(text, rng, drop=0.3).split()
    assert 640 < len(dropped) < 760 and dropped == sorted(dropped, key=int)
    swapped = rows.add_word_noise(text, rng, swap=1.0).split()
    assert swapped[:4] == ["1", "0", "3", "2"]
    assert rows.add_word_noise("one", rng, drop=1.0, swap=1.0) == "one"
    assert rows.add_word_noise(text, rng) == text


def test_noise_is_new_in_each_epoch_and_the_same_after_a_resume():
    """Each label stays with its text; a batch depends on the cursor alone."""
    texts = [f"{i} a b c d e f g" for i in range(10, 18)]  # the first word always stays
    labels = np.arange(10, 18, dtype=np.float32)
    encode = lambda text: [int(word) if word.isdigit() else ord(word) for word in text.split()]
    own = rows.NoisyRows(texts, labels, encode, 10, 1, drop=0.3, swap=0.0)
    config = RunConfig(batch_size=8, minibatches=1, steps=4)
    one, again, later = (own.batches(config, cursor) for cursor in (0, 0, 8))
    np.testing.assert_array_equal(one.tokens, again.tokens)
    seen = lambda batch: {
        int(row[on][0]): row[on][1:-1].tolist() for row, on in zip(batch.tokens, batch.mask)
    }
    assert sorted(seen(one)) == list(range(10, 18)) == sorted(seen(later))
    assert [int(row[on][0]) for row, on in zip(one.tokens, one.mask)] == one.extra["label"].tolist()
    assert seen(one) != seen(later) and any(len(words) < 7 for words in seen(one).values())
    two = own.batches(replace(config, steps_per_call=2), 0)
    np.testing.assert_array_equal(two.tokens, np.stack([one.tokens, later.tokens]))


def test_every_kind_of_row_begins_with_the_start_once():
    own, a, b = (7, 8), 97, 98
    both = lambda text: [7, 8, a] if text == "<" else encode(text)  # "<" has its own
    made = [
        rows.responses([("b", ""), ("<", "")], both, 4, eos=0, start=own),
        rows.preferences([("b", "", ""), ("<", "", "")], both, 4, eos=0, start=own).take(
            np.array([0, 1])
        ),
        rows.labelled(["b", "<"], np.zeros(2, np.float32), both, 4, eos=0, start=own),
    ]
    for found in made:
        assert {tuple(row) for row in found.tokens.tolist()} == {(7, 8, b, 0), (7, 8, a, 0)}


def test_three_parts_have_each_text_once():
    texts = [f"text {i}" for i in range(1000)]
    parts = rows.split_in_three(texts)
    assert sorted(i for part in parts for i in part) == list(range(1000))
    assert [round(len(part) / 1000, 1) for part in parts] == [0.8, 0.1, 0.1]
    assert parts[2] == rows.train_validation_split(texts, 0.1)[1]
