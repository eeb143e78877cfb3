import sys

import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo.errors import UserError
from jaxppo.rewards import text
from jaxppo.rewards.host import on_host


def test_vader():
    pytest.importorskip("vaderSentiment")
    judge = text.vader()
    assert judge("A wonderful, moving film.") > 0.5
    assert judge("A terrible, boring film.") < -0.5
    assert judge("A film.") == 0.0
    assert -1 <= judge("bad " * 1000) <= 1


def test_without_vader_one_line_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[demo\]"'):
        text.vader()


@pytest.mark.parametrize(
    ("rows", "n", "tokens", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], 1, None, 4 / 6),  # 1 2 3 4 of six
        ([[1, 2, 3], [1, 2, 4]], 2, None, 3 / 4),  # 12 23 24 of four
        ([[1, 2], [3, 4]], 2, None, 1.0),  # 23 crosses rows and is none
        ([[1, 1, 1, 1]], 2, None, 1 / 3),
        ([[1, 2, 3], [1, 2, 4]], 2, 4, 1.0),  # 4 tokens are 123 and 1: 12 23
        ([[1, 2, 3], [1, 2, 4]], 2, 5, 2 / 3),  # 123 and 12: 12 23 12
        ([[1], []], 2, None, 0.0),
        ([], 2, None, 0.0),
    ],
)
def test_distinct(rows, n, tokens, expected):
    assert text.distinct(rows, n, tokens=tokens) == pytest.approx(expected)


def test_standard_error():
    assert text.standard_error([1.0, 3.0]) == pytest.approx(1.0)  # deviation √2, over √2
    assert text.standard_error([2.0, 2.0, 2.0]) == 0.0
    assert text.standard_error([5.0]) == 0.0


PAIRS = [
    ("The cat sat on the mat.", "The cat is on the mat."),
    ("ein Café in Zürich", "Ein Café, in Zürich!"),
    ("", "something"),
    ("something", ""),
    ("a b c d e", "a b c d e"),
]
LIBRARIES = {
    "sacrebleu": (text.sentence_bleu, text.chrf),
    "rouge_score": (lambda: text.rouge("rouge1"),),
    "jiwer": (text.word_error_rate,),
    "profanity_check": (text.profanity,),
}


def test_bleu_and_chrf_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    bleu, chrf = text.sentence_bleu(), text.chrf()
    for response, reference in PAIRS:
        assert (
            bleu(response, reference) == sacrebleu.sentence_bleu(response, [reference]).score / 100
        )
        assert (
            chrf(response, reference) == sacrebleu.sentence_chrf(response, [reference]).score / 100
        )
    assert bleu("a b c d e", "a b c d e") == pytest.approx(1.0)
    # longer than its reference: the other way around there is a penalty for brevity
    assert bleu("a b c d e f", "a b c d") == pytest.approx((4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # character 1-grams alone: P = 1/2, R = 1, F2 = 5 P R / (4 P + R) = 5/6
    assert chrf("ab", "a") == pytest.approx(5 / 6)


def test_rouge_by_hand():
    """the cat sat / the cat is here: 2 · 2 / 7, bigrams 2 · 1 / 5; in another order the longest
    common one is "the cat".
    """
    pytest.importorskip("rouge_score")
    assert text.rouge("rouge1")("the cat sat", "The cat is here.") == pytest.approx(4 / 7)
    assert text.rouge("rouge2")("the cat sat", "The cat is here.") == pytest.approx(2 / 5)
    assert text.rouge("rougeL")("sat the cat", "the cat sat") == pytest.approx(2 / 3)
    assert text.rouge("rougeL")("", "") == 0.0


def test_word_errors():
    """Two of three words; one edit where nothing was expected."""
    pytest.importorskip("jiwer")
    rate = text.word_error_rate()
    assert rate("one too", "one two three") == pytest.approx(2 / 3)
    assert rate("one", "") == 1.0 and rate("", "") == 0.0


def test_profanity():
    pytest.importorskip("profanity_check")
    judge = text.profanity()
    assert judge("What a lovely morning.") < 0.2 < 0.8 < judge("you fucking idiot")
    assert 0 <= judge("") <= 1


@pytest.mark.parametrize("name", LIBRARIES)
def test_without_a_library_one_line_tells_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    for module in [module for module in sys.modules if module.startswith(f"{name}.")]:
        monkeypatch.setitem(sys.modules, module, None)
    for make in LIBRARIES[name]:
        with pytest.raises(
            UserError, match=rf'^{name} is not installed; pip install -e "\.\[tasks\]"$'
        ):
            make()


def test_answers():
    assert text.normalise_answer(" An  apple, (the) other's: THE END ") == "apple others end"
    assert text.exact_match("the Eiffel Tower.", "Eiffel tower") == 1.0
    assert text.exact_match("Eiffel", "Eiffel tower") == 0.0
    assert text.answer_f1("Eiffel", "the Eiffel tower") == pytest.approx(
        2 / 3
    )  # one word of one and of two
    assert text.answer_f1("no no no", "no no") == pytest.approx(0.8)  # two of three and of two
    assert [
        text.answer_f1(*pair)
        for pair in (("", ""), ("the", "a"), ("", "x"), ("x", "."), ("x", "y"))
    ] == [1, 1, 0, 0, 0]


def test_repeated():
    assert text.repeated_share("no no no", 1) == pytest.approx(2 / 3)
    assert text.repeated_share("a b a b a", 2) == 0.5
    assert (
        text.repeated_share("a b c", 2)
        == text.repeated_share("a", 2)
        == text.repeated_share("", 1)
        == 0.0
    )


def test_as_rewards_on_the_host(llama):
    """fn(prompt, response, reference), in this order."""
    rolled = toys.roll(llama, toys.prompts())
    extra = {
        "reference": jnp.full((8, 2), 3, jnp.int32),
        "reference_length": jnp.arange(8, dtype=jnp.int32) % 3,
    }
    judge = lambda prompt, response, reference: len(response.split()) - 10 * len(reference.split())
    decode = lambda rows: [" ".join(map(str, row)) for row in rows]
    scores, valid = on_host(judge, decode, references=True)({}, rolled.replace(extra=extra))
    np.testing.assert_array_equal(scores, np.asarray(rolled.mask.sum(1)) - 10 * (np.arange(8) % 3))
    assert valid.all()
