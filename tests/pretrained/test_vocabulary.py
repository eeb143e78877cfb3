import numpy as np
import pytest

from jaxppo.errors import UserError
from jaxppo.pretrained import vocabulary
from jaxppo.pretrained.tokenizer import END, from_file

TEXTS = ["The film was good.", "The film was not good, not at all.", "Good films are rare."] * 5


def test_bpe_writes_every_text():
    made = vocabulary.train_bpe(TEXTS, 300)
    assert made.vocab_size <= 300
    for text in [*TEXTS, "naïve 你好 \x00 never seen"]:
        assert made.decode(made.encode(text)) == text
    assert len(made.encode(" film")) < 5  # a frequent word is no longer five bytes
    assert made.token(made.eos_id) == END == made.decode([made.eos_id], skip_special=False)
    with pytest.raises(UserError, match="a vocabulary of 200 has no room for the 256 bytes"):
        vocabulary.train_bpe(TEXTS, 200)


def test_words_in_lower_case():
    made = vocabulary.train_words(TEXTS)
    assert made.decode(made.encode("The film was NOT good.")) == "the film was not good."
    assert len(made.encode("the unseen film")) == 3
    assert made.token(made.encode("unseen")[0]) == vocabulary.UNKNOWN
    # end, unknown, and the two most frequent, which are in every text; others are in two
    small = vocabulary.train_words(TEXTS, 4)
    assert {small.token(2), small.token(3)} == {"good", "."}


def test_a_tokenizer_is_saved_and_loaded(tmp_path):
    for made in (vocabulary.train_words(TEXTS), vocabulary.train_bpe(TEXTS, 300)):
        made.save(tmp_path)
        again = from_file(tmp_path, made.settings())
        assert again.encode(TEXTS[1]) == made.encode(TEXTS[1]) and again.eos_id == made.eos_id


def test_word_vectors(tmp_path):
    made = vocabulary.train_words(TEXTS)
    path = tmp_path / "vectors.txt"
    path.write_text("good 1 2 3\nbanana 9 9 9\nfilm -1 0 1\n")
    found, number = vocabulary.load_word_vectors(path, made, 3)
    assert found.shape == (made.vocab_size, 3) and number == 2
    assert found[made.encode("good")[0]].tolist() == [1, 2, 3] and found[
        made.encode("film")[0]
    ].tolist() == [-1, 0, 1]
    others = np.delete(found, [made.encode("good")[0], made.encode("film")[0]], 0)
    assert np.isfinite(found).all() and others.std() == pytest.approx(
        np.std([1, 2, 3, -1, 0, 1]), rel=0.5
    )


def test_word_vectors_for_bpe_and_words_with_blanks(tmp_path):
    """A word with and without a space before it: both tokens have its vector."""
    made = vocabulary.train_bpe(["and so and so and so"] * 50, 300)
    path = tmp_path / "vectors.txt"
    path.write_text(". . . 5 5 5\nand 1 2 3\n")
    found, number = vocabulary.load_word_vectors(path, made, 3)
    first, second = made.encode("and")[0], made.encode(" and")[0]
    assert first != second and number == 2
    assert found[first].tolist() == found[second].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("good 1 2 3 4\n", "vectors.txt:1: 4 numbers, but the embedding has 3"),
        ("good 1 2\n", "vectors.txt:1: 2 numbers, but the embedding has 3"),
        ("good 1 2 3\nfilm 1 x 3\n", "vectors.txt:2: could not convert"),
        ("good 1 2 nan\n", "vectors.txt:1: a number that is not finite"),
        ("banana 1 2 3\n", "has none of the vocabulary's"),
        ("good " + "1" * 70000, "vectors.txt:1: a line of more than 65536 characters"),
        (b"\xff\xfe", "cannot be read as word vectors"),
        (None, "cannot be read as word vectors"),
    ],
)
def test_bad_word_vectors(tmp_path, text, words):
    path = tmp_path / "vectors.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        vocabulary.load_word_vectors(path, vocabulary.train_words(TEXTS), 3)
