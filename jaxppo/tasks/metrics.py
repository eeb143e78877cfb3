"""Metrics of responses against references, with confidence intervals.

A `Metric` computes some sums of each row, and a value from the total: corpus BLEU is a
function of summed counts, not a mean over rows. One pass over the texts then serves the
value and an exact bootstrap over the rows. The values equal those of sacrebleu,
rouge-score, jiwer and seqeval, on corpora and on single rows.

    bleu, chrf                0 to 100: BLEU, tokenizer 13a, smoothing "exp"; chrF2
    rouge1, rouge2, rougeL    mean F-measure, 0 to 1, without stemmer
    wer, cer                  edits / words or characters of all references
    exact                     share of responses equal to the reference, when stripped
    answer_exact, answer_f1   equality and F1 of words after SQuAD's normalisation
    entity_f1                 micro F1 of the entities of BIO tags, separated by spaces
    named_f1                  the same for "Jack = person; New York = place" or "none"
    distinct_1, distinct_2    distinct n-grams / n-grams of all responses together
    reverse_text              mean ratio of the text in <reversed_text> tags
    countdown_result, _format share of puzzles solved; of answers in <answer> tags
    gsm8k_strict, _flexible   share of final numbers right, after "####" or anywhere
    positivity                mean VADER sentiment, -1 to 1
    repetition, length        mean share of repeated bigrams; mean number of words
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxppo.errors import UserError
from jaxppo.rewards import answers, text

PIECE = 2**22  # row counts of bootstrap draws in memory at once, some 32 MB
SAMPLES, LEVEL = 1000, 0.95  # bootstrap draws; the share of intervals that hold the truth
Texts = Sequence[str]
Interval = tuple[float, float, float]  # value, low, high


class Metric(NamedTuple):
    """A function of sums over rows. If that is impossible for several rows, as for
    counts of distinct n-grams, `whole` computes the value.
    """

    rows: Callable[[str, str], np.ndarray]  # (response, reference) -> [K]
    reduce: Callable[[np.ndarray], np.ndarray]  # sums over rows [... K] -> [...]
    # responses -> (value, values without each response [N])
    whole: Callable[[Texts], tuple[float, np.ndarray]] | None = None


def evaluate(names: Iterable[str], responses: Texts, references: Texts) -> dict[str, float]:
    """Compute metrics by name. Raises UserError for an unknown name, or without
    responses.

    >>> evaluate(["exact", "length"], ["4", "two words"], ["4", "5"])
    {'exact': 0.5, 'length': 1.5}
    """
    values = {}
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}; choose one of {', '.join(METRICS)}")
        metric, sums = METRICS[name], _row_sums(METRICS[name], responses, references)
        values[name] = (
            metric.whole(responses)[0] if metric.whole else float(metric.reduce(sums.sum(0)))
        )
    return values


def interval(metric: Metric, responses: Texts, references: Texts, *, seed: int) -> Interval:
    """Return (value, low, high) by percentile bootstrap over the rows (Efron 1979,
    https://doi.org/10.1214/aos/1176344552).

    Distinct n-grams of rows that are drawn twice cannot be counted. A metric with
    `whole` gets value ± z · the jackknife's standard error, which is rather too wide
    (Efron & Stein 1981, https://doi.org/10.1214/aos/1176345462).
    """
    sums = _row_sums(metric, responses, references)
    if metric.whole:
        return _jackknife(*metric.whole(responses))
    drawn = metric.reduce(_resample(sums, seed, SAMPLES))
    return float(metric.reduce(sums.sum(0))), *_percentiles(drawn)


def paired_difference(
    metric: Metric, before: Texts, after: Texts, references: Texts, *, seed: int
) -> Interval:
    """Return (after − before, low, high). Each bootstrap draw takes the same rows of
    both, so that hard rows cancel out (Koehn 2004, https://aclanthology.org/W04-3250).
    """
    both = np.concatenate([_row_sums(metric, x, references) for x in (before, after)], 1)
    if metric.whole:
        (one, one_without), (other, other_without) = metric.whole(before), metric.whole(after)
        return _jackknife(other - one, other_without - one_without)
    gain = lambda sums: np.subtract(*(metric.reduce(x) for x in reversed(np.split(sums, 2, -1))))
    return float(gain(both.sum(0))), *_percentiles(gain(_resample(both, seed, SAMPLES)))


def _row_sums(metric: Metric, responses: Texts, references: Texts) -> Float[np.ndarray, "N K"]:
    if not len(responses):
        raise UserError("there are no responses to measure")
    rows = zip(responses, references, strict=True)
    return np.stack([np.asarray(metric.rows(*row), np.float64) for row in rows])


def _resample(sums: Float[np.ndarray, "N K"], seed: int, samples: int) -> Float[np.ndarray, "S K"]:
    """Sum N rows drawn with replacement, `samples` times."""
    rng, rows = np.random.default_rng(seed), len(sums)
    size = max(1, PIECE // rows)
    drawn = [
        rng.multinomial(rows, np.full(rows, 1 / rows), min(size, samples - start)) @ sums
        for start in range(0, samples, size)
    ]
    return np.concatenate(drawn)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _jackknife(value: float, without: Float[np.ndarray, "N"]) -> Interval:
    error = float(np.sqrt((len(without) - 1) * without.var()))
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * error
    return value, value - half, value + half


def _ratio(sums: np.ndarray) -> np.ndarray:
    """First sum / second; the first where the second is 0, like jiwer."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def _mean(score: Callable[[str, str], float]) -> Metric:
    return Metric(lambda response, reference: np.array([score(response, reference), 1.0]), _ratio)


def _mean_of(make: Callable[[], Callable[..., float]], *, references: bool = True) -> Metric:
    """The mean of a judge that is made (and its package imported) at its first use."""
    judge = cache(make)
    return _mean(lambda *pair: judge()(*pair[: 1 + references]))


def _sacrebleu(name: str) -> Metric:
    """The statistics of rows and the score of their sums that sacrebleu's own bootstrap
    uses. They are methods of its base class `Metric`, though their names are private.
    """
    scorer: Callable[[], Any] = cache(lambda: getattr(text.import_extra("sacrebleu"), name)())
    score = lambda sums: scorer()._compute_score_from_stats(sums.tolist()).score
    return Metric(
        lambda response, reference: np.array(
            scorer()._extract_corpus_statistics([response], [[reference]])[0]
        ),
        lambda sums: np.apply_along_axis(score, -1, sums),
    )


def _edits(process: str, response: str, reference: str) -> np.ndarray:
    found = getattr(text.import_extra("jiwer"), process)(reference, response)
    kept = found.hits + found.substitutions + found.deletions
    return np.array([found.substitutions + found.deletions + found.insertions, kept])


def _entity_rows(response: str, reference: str) -> np.ndarray:
    """(2 · common entities, entities of both), for as many tags as the reference has:
    missing tags are O.
    """
    tags = reference.split()
    found, wanted = text.entities(response.split()[: len(tags)]), text.entities(tags)
    return np.array([2 * len(found & wanted), len(found) + len(wanted)])


def _named_rows(response: str, reference: str) -> np.ndarray:
    """(2 · common entities, entities of both), of entities written as text; one may
    occur twice.
    """
    parts = lambda text: [" ".join(part.split()) for part in text.split(";")]
    count = lambda text: Counter(part for part in parts(text) if part not in ("", "none"))
    found, wanted = count(response), count(reference)
    return np.array([2 * (found & wanted).total(), found.total() + wanted.total()])


def _distinct(n: int) -> Metric:
    """Distinct n-grams of words / n-grams, of all responses together."""

    def whole(responses: Texts) -> tuple[float, np.ndarray]:
        split = [response.split() for response in responses]
        rows = [Counter(zip(*(words[k:] for k in range(n)))) for words in split]
        owners = Counter(gram for row in rows for gram in row)
        # without a response, the n-grams that it alone has are gone
        alone = np.array([sum(owners[gram] == 1 for gram in row) for row in rows])
        counts = np.array([row.total() for row in rows])
        share = lambda kinds, total: kinds / np.maximum(total, 1)
        value = float(share(len(owners), counts.sum()))
        return value, share(len(owners) - alone, counts.sum() - counts)

    one = _mean(lambda response, reference: text.distinct([response.split()], n))
    return one._replace(whole=whole)


def same(response: str, reference: str) -> bool:
    """Whether two texts are equal. Outer spaces do not count."""
    return response.strip() == reference.strip()


METRICS: dict[str, Metric] = {
    "exact": _mean(same),
    "answer_exact": _mean(text.exact_match),
    "answer_f1": _mean(text.answer_f1),
    "bleu": _sacrebleu("BLEU"),
    "chrf": _sacrebleu("CHRF"),
    **{kind: _mean_of(partial(text.rouge, kind)) for kind in ("rouge1", "rouge2", "rougeL")},
    "wer": Metric(partial(_edits, "process_words"), _ratio),
    "cer": Metric(partial(_edits, "process_characters"), _ratio),
    "entity_f1": Metric(_entity_rows, _ratio),
    "named_f1": Metric(_named_rows, _ratio),
    "reverse_text": _mean(answers.reversed_text),
    "countdown_result": _mean(answers.countdown_result),
    "countdown_format": _mean(answers.countdown_format),
    "gsm8k_strict": _mean(answers.gsm8k),
    "gsm8k_flexible": _mean(partial(answers.gsm8k, flexible=True)),
    "positivity": _mean_of(text.vader, references=False),
    "distinct_1": _distinct(1),
    "distinct_2": _distinct(2),
    "length": _mean(lambda response, reference: len(response.split())),
    "repetition": _mean(lambda response, reference: text.repeated_share(response, 2)),
}
