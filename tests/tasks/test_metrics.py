"""The public packages' numbers on a thousand pairs of texts, on the whole and row by row; and
intervals that cover.
"""

import math

import numpy as np
import pytest

from jaxppo.ablation import statistics
from jaxppo.errors import UserError
from jaxppo.rewards import text
from jaxppo.tasks import metrics
from jaxppo.tasks.datasets import entities
from jaxppo.tasks.metrics import METRICS

SENTENCES = """the a cat dog sat on mat house is was not very big small it's don't U.S. e.g.
3.14 1,000 -5 50% (yes) "no" Hello, world! end. Café naïve Zürich über straße
привет мир 你好 世界 日本語 🙂 ½ &amp; <tag> re-use state-of-the-art x=y a.b"""
WORDS = SENTENCES.split()
GAPS = [" "] * 12 + ["  ", " , ", "\u00a0", " - "]


def made_up(number=1000, seed=0):
    """Responses and references: a sentence and the same with some words changed, left out or put
    in; some sides are empty.
    """
    rng = np.random.default_rng(seed)
    some = lambda n: [WORDS[i] for i in rng.zipf(1.3, n) % len(WORDS)]
    join = lambda words: "".join(
        word + GAPS[i] for word, i in zip(words, rng.integers(0, len(GAPS), len(words)))
    ).strip(" ")
    responses, references = [], []
    for _ in range(number):
        words = some(rng.integers(0, 15))
        kept = [
            w
            for word in words
            for w in ([word], some(1), [], [word, *some(1)])[rng.choice(4, p=[0.7, 0.1, 0.1, 0.1])]
        ]
        responses.append(join(words))
        references.append(join(kept))
    for row in range(10):  # empty on one side, on the other, on both
        responses[3 * row] = references[3 * row + 1] = responses[3 * row + 2] = references[
            3 * row + 2
        ] = ""
    references[30:70] = responses[30:70]
    references[70:90] = [x.upper() for x in responses[70:90]]
    references[90:95] = [x + " long-" for x in references[90:95]]
    responses[90:95] = [x + "\n" for x in references[90:95]]  # a hyphen at the end joins nothing
    return responses, references


RESPONSES, REFERENCES = made_up()


def whole(name, responses=RESPONSES, references=REFERENCES):
    return metrics.evaluate([name], responses, references)[name]


def rows(name, responses=RESPONSES, references=REFERENCES):
    metric = METRICS[name]
    return np.array(
        [metric.reduce(metric.rows(*pair)) for pair in zip(responses, references, strict=True)]
    )


def test_the_pairs_are_of_every_kind():
    pairs = list(zip(RESPONSES, REFERENCES, strict=True))
    assert (
        sum(not a and bool(b) for a, b in pairs) > 5
        and sum(bool(a) and not b for a, b in pairs) > 5
    )
    assert pairs.count(("", "")) > 5 and sum(a == b != "" for a, b in pairs) > 30


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_are_sacrebleus(name):
    sacrebleu = pytest.importorskip("sacrebleu")
    theirs = {"bleu": sacrebleu.BLEU(), "chrf": sacrebleu.CHRF()}[name]
    corpus = theirs.corpus_score(RESPONSES, [REFERENCES]).score
    assert corpus > 40  # there is something to find
    assert whole(name) == pytest.approx(corpus, abs=1e-6)
    want = [
        theirs.corpus_score([a], [[b]]).score for a, b in zip(RESPONSES, REFERENCES, strict=True)
    ]
    np.testing.assert_allclose(rows(name), want, atol=1e-6)
    # a small corpus misses some orders, and one of short texts has no 4-grams
    for few in (slice(0, 3), slice(0, 32), slice(70, 75)):
        part = RESPONSES[few], REFERENCES[few]
        assert whole(name, *part) == pytest.approx(
            theirs.corpus_score(part[0], [part[1]]).score, abs=1e-6
        )
    assert whole(name, ["a b", "c"], ["a b", "d"]) == pytest.approx(
        theirs.corpus_score(["a b", "c"], [["a b", "d"]]).score
    )


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores(name):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer([name])
    want = [scorer.score(b, a)[name].fmeasure for a, b in zip(RESPONSES, REFERENCES, strict=True)]
    np.testing.assert_allclose(rows(name), want, atol=1e-6)
    assert whole(name) == pytest.approx(np.mean(want), abs=1e-6)


@pytest.mark.parametrize("name", ["wer", "cer"])
def test_error_rates_are_jiwers(name):
    """Of the corpus: all edits over all words, which is no mean of the rows' rates."""
    jiwer = pytest.importorskip("jiwer")
    rate = {"wer": jiwer.wer, "cer": jiwer.cer}[name]
    assert whole(name) == pytest.approx(rate(REFERENCES, RESPONSES), abs=1e-6)
    want = [rate(b, a) for a, b in zip(RESPONSES, REFERENCES, strict=True)]
    np.testing.assert_allclose(rows(name), want, atol=1e-6)
    assert abs(np.mean(want) - whole(name)) > 0.01
    assert whole(name, ["a b"], [""]) == rate([""], ["a b"])


def test_entities_are_seqevals():
    seqeval = pytest.importorskip("seqeval.metrics")
    rng = np.random.default_rng(0)
    names = np.array(["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-A-B", "I-A-B"])
    wanted = [names[rng.integers(0, 7, n)].tolist() for n in rng.integers(0, 13, 1000)]
    found = [
        [tag if rng.random() < 0.8 else str(rng.choice(names)) for tag in row] for row in wanted
    ]
    # a response of another length: padded with O, and cut
    said = [row[: len(row) - rng.integers(0, 3)] + ["B-PER"] * rng.integers(0, 2) for row in found]
    fitted = [(row + ["O"] * 13)[: len(other)] for row, other in zip(said, wanted, strict=True)]
    assert any(len(a) < len(b) for a, b in zip(said, wanted)) and any(
        len(a) > len(b) for a, b in zip(said, wanted)
    )
    texts = [" ".join(row) for row in said], [" ".join(row) for row in wanted]
    assert whole("entity_f1", *texts) == pytest.approx(seqeval.f1_score(wanted, fitted), abs=1e-6)
    for i in range(0, 1000, 5):
        if any(tag != "O" for tag in wanted[i] + fitted[i]):  # without any it warns, and says 0
            want = seqeval.f1_score([wanted[i]], [fitted[i]], zero_division=0)
            assert rows("entity_f1", [texts[0][i]], [texts[1][i]])[0] == pytest.approx(
                want, abs=1e-6
            ), texts[1][i]
    assert whole("entity_f1", ["O hello"], ["O O"]) == 0.0  # a word that is no tag


def test_entities_written_out_are_seqevals():
    """The same F1 as of the tags, where no two entities of a row are equal."""
    seqeval = pytest.importorskip("seqeval.metrics")

    rng = np.random.default_rng(1)
    spans = ["O", "B-person", "B-person I-person", "B-movie", "B-movie I-movie I-movie"]
    draw = lambda: " ".join(rng.choice(spans, rng.integers(0, 7))).split()
    wanted, found = [draw() for _ in range(1000)], [draw() for _ in range(1000)]
    for i in range(0, 1000, 2):  # every other one is half right
        found[i] = list(wanted[i])
        for k, tag in enumerate(wanted[i]):
            if tag == "B-person" and rng.random() < 0.5:
                found[i][k : k + 1] = ["O"]
                if wanted[i][k + 1 : k + 2] == ["I-person"]:
                    found[i][k + 1] = "O"
    fitted = [(row + ["O"] * 30)[: len(other)] for row, other in zip(found, wanted)]
    # cutting may leave an I- without its beginning: never, since what is cut off is the end
    said = [entities.describe_entities([f"w{k}" for k in range(len(row))], row) for row in fitted]
    true = [entities.describe_entities([f"w{k}" for k in range(len(row))], row) for row in wanted]
    assert "none" in said and any(";" in text for text in said)
    assert whole("named_f1", said, true) == pytest.approx(
        seqeval.f1_score(wanted, fitted), abs=1e-6
    )
    assert 0.2 < whole("named_f1", said, true) < 0.9


def test_positivity_is_vaders():
    pytest.importorskip("vaderSentiment")
    assert rows("positivity", ["a good film", "a bad film", "a film"], [""] * 3).round(
        4
    ).tolist() == [0.4404, -0.5423, 0.0]


def test_literal_numbers():
    pytest.importorskip("jiwer")
    responses, references = ["a b a b", " yes ", "No."], ["a b", "yes", "no"]
    names = [
        "exact",
        "answer_exact",
        "answer_f1",
        "length",
        "repetition",
        "distinct_1",
        "distinct_2",
        "wer",
    ]
    got = metrics.evaluate(names, responses, references)
    want = {
        "exact": 1 / 3,
        "answer_exact": 2 / 3,
        "answer_f1": (2 / 3 + 1 + 1) / 3,  # articles go: b b against b, one of two and of one
        "length": 2.0,
        "repetition": 1 / 9,  # ab ba ab: one of three
        "distinct_1": 4 / 6,
        "distinct_2": 2 / 3,
        "wer": 3 / 4,  # two words too many, and No. for no
    }
    assert got == pytest.approx(want)
    # of one row alone, distinct_2 is that row's own share: ab ba of three
    assert rows("distinct_2", responses, references).tolist() == pytest.approx([2 / 3, 0, 0])


OF_RECIPES = ("countdown_result", "countdown_format", "gsm8k_strict", "gsm8k_flexible")


@pytest.mark.parametrize(  # those of recipes are means, as `exact`, of tagged answers
    "name", [x for x, metric in METRICS.items() if metric.whole is None and x not in OF_RECIPES]
)
def test_a_draw_of_rows_is_the_metric_of_the_drawn_texts(name):
    """The sums times how often each row was drawn, against the texts repeated as often."""
    for library in ("sacrebleu", "rouge_score", "jiwer"):
        pytest.importorskip(library)
    texts = RESPONSES[25:105], REFERENCES[25:105]
    found = metrics._row_sums(METRICS[name], *texts)
    rng = np.random.default_rng(7)
    counts = rng.multinomial(80, np.full(80, 1 / 80), 3)
    drawn = METRICS[name].reduce(metrics._resample(found, 7, 3))
    want = [
        whole(name, *([x for x, n in zip(side, row) for _ in range(n)] for side in texts))
        for row in counts
    ]
    np.testing.assert_allclose(drawn, want, rtol=1e-9)
    assert len(set(want)) > 1 or name in ("entity_f1", "named_f1")  # these are no tags


@pytest.mark.parametrize("piece", [1, 20, 1000])
def test_draws_in_pieces_are_the_same(monkeypatch, piece):
    """Of 10 rows: one draw a piece, two (the last piece has one), and all five at once."""
    found = np.arange(20.0).reshape(10, 2)
    whole = metrics._resample(found, 0, 5)
    monkeypatch.setattr(metrics, "PIECE", piece)
    np.testing.assert_array_equal(metrics._resample(found, 0, 5), whole)
    assert whole.shape == (5, 2) and (whole[:, 1] - whole[:, 0] == 10).all()  # ten rows a draw


def shares(p, count, seed):
    """Responses that are right with probability p."""
    right = np.random.default_rng(seed).random(count) < p
    return ["yes" if x else "no" for x in right], ["yes"] * count


def test_an_interval_of_a_mean_is_the_normal_one(monkeypatch):
    """Of 400 rows with share p: p ± 1.96 √(p (1 − p) / 400), or 1.645 for 90 %."""
    texts = shares(0.3, 400, 0)
    for level, z in ((0.95, 1.96), (0.9, 1.645)):
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "SAMPLES", 4000)
            patch.setattr(metrics, "LEVEL", level)
            value, low, high = metrics.interval(METRICS["exact"], *texts, seed=1)
        half = z * math.sqrt(value * (1 - value) / 400)
        assert value == whole("exact", *texts)
        assert (low, high) == pytest.approx((value - half, value + half), abs=0.1 * half)
    one, other = (metrics.interval(METRICS["exact"], *texts, seed=seed) for seed in (1, 1))
    assert one == other != metrics.interval(METRICS["exact"], *texts, seed=2)


def test_intervals_cover_the_truth(monkeypatch):
    """Of 200 intervals of 95 % some 190 hold it, ± 3 · √(200 · .95 · .05) = 9; the bootstrap of 100
    rows is a little narrow.
    """
    monkeypatch.setattr(metrics, "SAMPLES", 400)
    inside = 0
    for seed in range(200):
        _, low, high = metrics.interval(METRICS["exact"], *shares(0.3, 100, seed), seed=seed)
        inside += low <= 0.3 <= high
    assert 178 <= inside <= 199


def test_what_both_have_in_common_falls_out():
    """Each response is a word longer than before: the difference is 1 in every draw, though lengths
    differ much.
    """
    before = ["x " * (1 + i * i) for i in range(30)]
    after = [x + "y" for x in before]
    metric = METRICS["length"]
    assert metrics.paired_difference(metric, before, after, before, seed=0) == (1.0, 1.0, 1.0)
    _, low, high = metrics.interval(metric, before, before, seed=0)
    assert high - low > 100
    assert metrics.paired_difference(metric, after, before, before, seed=0) == (-1.0, -1.0, -1.0)
    (one, references), (other, _) = shares(0.3, 400, 5), shares(0.5, 400, 5)
    value, low, high = metrics.paired_difference(METRICS["exact"], one, other, references, seed=0)
    assert (
        0.1 < low < value < high < 0.3
    )  # the same random numbers: those below .3 are below .5 too


def corpus(seed, rows=150):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{int(i)}" for i in rng.zipf(1.6, 10) % 500) for _ in range(rows)]


def without_each(name, responses):
    metric = METRICS[name].whole
    assert metric is not None
    return metric(responses)


@pytest.mark.parametrize("name", ["distinct_1", "distinct_2"])
def test_distinct_without_each_row(name):
    responses, n = [*corpus(0, 40), "", "w1"], int(name[-1])
    of = lambda texts: text.distinct([x.split() for x in texts], n)
    value, without = without_each(name, responses)
    assert value == pytest.approx(of(responses)) == whole(name, responses, responses)
    np.testing.assert_allclose(
        without, [of(responses[:i] + responses[i + 1 :]) for i in range(len(responses))], rtol=1e-12
    )
    _, low, high = metrics.interval(METRICS[name], responses, responses, seed=0)
    half = 1.959964 * np.sqrt(41 / 42 * ((without - without.mean()) ** 2).sum())
    assert (low, high) == pytest.approx((value - half, value + half))
    gain = metrics.paired_difference(METRICS[name], responses, responses, responses, seed=0)
    assert gain == (0.0, 0.0, 0.0)
    other = [*corpus(1, 40), "", "w1"]
    assert metrics.paired_difference(METRICS[name], responses, other, other, seed=0)[
        0
    ] == pytest.approx(of(other) - of(responses))


def test_the_jackknife_knows_how_much_distinct_varies():
    """The deviation over 100 corpora, against what the jackknife says of single ones: not much
    less, and not twice as much.
    """
    values = [without_each("distinct_1", corpus(seed))[0] for seed in range(100)]
    ends = lambda texts: metrics.interval(METRICS["distinct_1"], texts, texts, seed=0)[1:]
    said = [np.diff(ends(corpus(seed)))[0] / 2 / 1.96 for seed in range(20)]
    assert 0.8 < np.mean(said) / np.std(values) < 1.6


def test_means_over_seeds():
    """1 2 3: 2 ± 4.3027 · 1 / √3; t of one degree of freedom is 12.706: 1.5 ± 12.706 · .7071 /
    √2.
    """
    assert statistics.mean_interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2.0, 2 - 2.48414, 2 + 2.48414), abs=1e-4
    )
    assert statistics.mean_interval([1.0, 2.0]) == pytest.approx(
        (1.5, 1.5 - 6.3531, 1.5 + 6.3531), abs=1e-3
    )
    assert statistics.mean_interval([4.0]) == (4.0, -math.inf, math.inf)


def test_what_cannot_be_measured():
    with pytest.raises(UserError, match="unknown metric 'bleurt'; choose one of exact, "):
        metrics.evaluate(["bleurt"], ["a"], ["a"])
    with pytest.raises(ValueError, match="is shorter than"):
        metrics.paired_difference(METRICS["exact"], ["a"], ["a", "b"], ["a"], seed=0)
    with pytest.raises(UserError, match="no responses"):
        metrics.interval(METRICS["distinct_1"], [], [], seed=0)
