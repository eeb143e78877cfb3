"""Literal numbers, and the same as the public packages on a thousand random pairs, real sentences
and empty ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo.rewards import metrics
from jaxppo.rewards import text as strings
from jaxppo.rewards.metrics import Text
from jaxppo.types import Rollout

WIDTH = 12


def text(*rows, width=WIDTH) -> Text:
    """Ids from slot 0 on; what stands behind is no padding of its own, but another text's."""
    tokens = np.full((len(rows), width), 3, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return Text(jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32))


def pairs(number=1000, vocab=5, seed=0):
    """Short texts over few words, so that there is much in common; some are empty, and some
    equal.
    """
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(1, vocab + 1, rng.integers(0, WIDTH + 1)).tolist()
    found, wanted = [draw() for _ in range(number)], [draw() for _ in range(number)]
    wanted[:50] = found[:50]
    found[50], wanted[51], found[52], wanted[52] = [], [], [], []
    return found, wanted


FOUND, WANTED = pairs()
SENTENCES = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("ein Café in Zürich – naïve façade", "ein Café in Zürich"),
    ("привет мир 你好 世界", "мир привет 世界"),
    ("it is what it is what it is", "it is it"),
]


def words(*some):
    """Sentences as ids, and the ids' words again."""
    known = sorted({word for sentence in some for word in sentence.split()})
    return [[known.index(word) for word in sentence.split()] for sentence in some], known


def ours(metric):
    ids, _ = words(*(sentence for pair in SENTENCES for sentence in pair))
    random = np.asarray(jax.jit(metric)(text(*FOUND), text(*WANTED)))
    real = np.asarray(jax.jit(metric)(text(*ids[0::2]), text(*ids[1::2])))
    return np.concatenate([random, real])


def theirs(score):
    """A package's function of two strings, on the same tokens written as words."""
    plain = lambda row: " ".join(f"w{i}" for i in row)
    both = [*zip(map(plain, FOUND), map(plain, WANTED), strict=True), *SENTENCES]
    return np.asarray([score(found, wanted) for found, wanted in both])


def test_edit_distance_by_hand():
    """kitten -> sitting: k/s, e/i, +g."""
    found, wanted = ([ord(letter) for letter in word] for word in ("kitten", "sitting"))
    assert metrics.edit_distance(text(found), text(wanted)).tolist() == [3]
    assert metrics.edit_distance(text([], [1, 2], []), text([1, 2], [], [])).tolist() == [2, 2, 0]
    assert metrics.error_rate(text([1, 2]), text([1])).tolist() == [1.0]


def test_common_ngrams_are_clipped():
    """ "the the the" against "the cat the": two of three; "a b a b" against "a b": one bigram."""
    assert metrics.common_ngrams(text([1, 1, 1]), text([1, 2, 1]), 1).tolist() == [2]
    assert metrics.common_ngrams(text([1, 2, 1, 2]), text([1, 2]), 2).tolist() == [1]
    assert metrics.common_ngrams(text([1]), text([1, 2]), 2).tolist() == [0]


def test_common_subsequence_by_hand():
    assert metrics.common_subsequence(text([1, 2, 3, 4, 1]), text([3, 4, 1, 2, 1])).tolist() == [
        3
    ]  # 3 4 1


def test_bleu_by_hand():
    """1 2 3 against 1 2 4 5: precisions 2/3, 1/2, and no trigram: (1/2) / 1; brevity exp(1 −
    4/3).
    """
    want = (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3) * np.exp(1 - 4 / 3)
    assert float(metrics.bleu(text([1, 2, 3]), text([1, 2, 4, 5]))[0]) == pytest.approx(
        want, rel=1e-6
    )


def test_bleu_is_sacrebleus():
    bleu = pytest.importorskip("sacrebleu.metrics").BLEU(
        tokenize="none", effective_order=True, smooth_method="exp"
    )
    want = theirs(lambda found, wanted: bleu.sentence_score(found, [wanted]).score / 100)
    np.testing.assert_allclose(ours(metrics.bleu), want, atol=1e-6)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores(name):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")

    class Words:
        def tokenize(self, sentence):
            return sentence.split()

    theirs_ = scorer.RougeScorer([name], tokenizer=Words())
    metric = {
        "rouge1": metrics.rouge,
        "rouge2": lambda a, b: metrics.rouge(a, b, n=2),
        "rougeL": metrics.rouge_l,
    }[name]
    np.testing.assert_allclose(
        ours(metric),
        theirs(lambda found, wanted: theirs_.score(wanted, found)[name].fmeasure),
        atol=1e-6,
    )


def test_the_error_rate_is_jiwers():
    jiwer = pytest.importorskip("jiwer")
    np.testing.assert_allclose(
        ours(metrics.error_rate), theirs(lambda found, wanted: jiwer.wer(wanted, found)), atol=1e-6
    )


def test_answers():
    """SQuAD: 2 common words of 3 and of 2: 4 / 5; two empty answers agree, one alone does not."""
    found, wanted = text([1, 2, 3], [], [], [1, 2]), text([2, 1], [], [1], [1, 2])
    np.testing.assert_allclose(metrics.token_f1(found, wanted), [0.8, 1.0, 0.0, 1.0], rtol=1e-6)
    assert metrics.exact_match(found, wanted).tolist() == [0.0, 1.0, 0.0, 1.0]


def test_answers_are_scored_as_on_the_host():
    plain = [
        tuple(" ".join(f"w{i}" for i in row) for row in pair)
        for pair in zip(FOUND, WANTED, strict=True)
    ]
    for metric, score in (
        (metrics.token_f1, strings.answer_f1),
        (metrics.exact_match, strings.exact_match),
    ):
        np.testing.assert_allclose(
            jax.jit(metric)(text(*FOUND), text(*WANTED)),
            [score(*pair) for pair in plain],
            atol=1e-6,
        )


def test_as_a_reward():
    """The response without its end; the reference comes with the prompt."""
    eos = 9
    tokens = jnp.array([[7, 1, 2, eos, 0], [7, 1, 2, 3, 4]])
    mask = jnp.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    zeros = jnp.zeros((2, 4))
    extra = {"reference": jnp.array([[1, 2, 8], [1, 2, 3]]), "reference_length": jnp.array([2, 3])}
    rolled = Rollout(
        tokens, tokens > 0, mask, jnp.array([True, False]), zeros, zeros, zeros, zeros, extra
    )
    scores, valid = metrics.as_reward(metrics.exact_match, eos=eos)({}, rolled)
    assert scores.tolist() == [1.0, 0.0] and valid.all()
    scores, _ = metrics.as_reward(metrics.rouge_l, eos=eos)({}, rolled)
    np.testing.assert_allclose(scores, [1.0, 2 * 3 / 7], rtol=1e-6)
