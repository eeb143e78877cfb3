"""Metrics of responses against references, and how sure they are.

A `Metric` says of each row some sums, and what is made of them: corpus BLEU is no mean
over rows, but a function of sums of counts. So one pass over the texts gives the value,
and a bootstrap over the rows is exact and only adds numbers. On whole corpora and on
single rows they are sacrebleu's, rouge-score's, jiwer's and seqeval's numbers
(`tests/test_evaluation.py`).

    bleu, chrf                in 0 to 100: BLEU with tokenizer 13a and smoothing "exp", chrF2
    rouge1, rouge2, rougeL    mean F-measure in 0 to 1, without stemmer
    wer, cer                  edits / words or characters of all references; less is better
    exact (= accuracy)        share of responses that are the reference, but for blanks around it
    answer_exact, answer_f1   the same, and F1 of words, after SQuAD's normalisation
    entity_f1                 micro F1 of the entities of BIO tags with blanks between them
    named_f1                  the same of entities written out, "Jack = person; New York = place" or "none"
    distinct_1, distinct_2    distinct n-grams / n-grams of all responses together
    positivity                mean sentiment by VADER, in -1 to 1
    repetition, length        mean share of bigrams that stand in the response before; mean number of words
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxppo.errors import UserError
from jaxppo.rewards import text

PIECE = 2**22  # counts of draws in memory at once, some 32 MB
Texts = Sequence[str]
Interval = tuple[float, float, float]  # value, low, high


class Metric(NamedTuple):
    """A function of sums over rows. Where it is none, as a count of kinds, `whole` is
    asked about more than one row.
    """

    rows: Callable[[str, str], np.ndarray]  # (response, reference) -> [K]
    reduce: Callable[[np.ndarray], np.ndarray]  # sums over rows [... K] -> [...]
    whole: Callable[[Texts], tuple[float, np.ndarray]] | None = (
        None  # responses -> the value, and that without each of them [N]
    )


def evaluate(names: Iterable[str], responses: Texts, references: Texts) -> dict[str, float]:
    """The metrics of these names. Raises UserError for an unknown name, and where there
    is nothing to measure.

    >>> evaluate(["exact", "length"], ["4", "two words"], ["4", "5"])
    {'exact': 0.5, 'length': 1.5}
    """
    values = {}
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}; choose one of {', '.join(METRICS)}")
        metric, found = METRICS[name], _statistics(METRICS[name], responses, references)
        values[name] = (
            metric.whole(responses)[0] if metric.whole else float(metric.reduce(found.sum(0)))
        )
    return values


def interval(
    metric: Metric,
    responses: Texts,
    references: Texts,
    *,
    seed: int,
    samples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """(value, low, high): percentile bootstrap over the rows (Efron 1979,
    https://doi.org/10.1214/aos/1176344552).

    Kinds of n-grams cannot be counted in rows that are drawn twice: there it is value ±
    z · standard error of the jackknife, which is too wide rather than too narrow (Efron
    & Stein 1981, https://doi.org/10.1214/aos/1176345462).
    """
    found = _statistics(metric, responses, references)
    if metric.whole:
        return _jackknife(*metric.whole(responses), level)
    drawn = metric.reduce(_resampled(found, seed, samples))
    return float(metric.reduce(found.sum(0))), *_middle(drawn, level)


def paired_difference(
    metric: Metric,
    before: Texts,
    after: Texts,
    references: Texts,
    *,
    seed: int,
    samples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """(after − before, low, high): as `interval`, where each draw takes the same rows
    of both, so that what makes a row hard for both falls out (Koehn 2004,
    https://aclanthology.org/W04-3250).
    """
    both = np.concatenate([_statistics(metric, x, references) for x in (before, after)], 1)
    if metric.whole:
        (one, one_without), (other, other_without) = metric.whole(before), metric.whole(after)
        return _jackknife(other - one, other_without - one_without, level)
    gain = lambda sums: np.subtract(*(metric.reduce(x) for x in reversed(np.split(sums, 2, -1))))
    return float(gain(both.sum(0))), *_middle(gain(_resampled(both, seed, samples)), level)


def pass_at_k(right: Int[np.ndarray, "N"], n: int, k: int) -> Float[np.ndarray, "N"]:
    """The chance that one of k samples is right, for each problem of whose n samples
    `right` were: 1 − C(n − c, k) / C(n, k), unbiased (Chen et al. 2021,
    https://arxiv.org/abs/2107.03374). Raises UserError where k or a count does not fit
    n.

    >>> pass_at_k(
    ...     np.array([0, 1, 3]), 4, 2
    ... )  # 1 − 3/6: C(3, 2) = 3 of C(4, 2) = 6 draws miss the one
    array([0. , 0.5, 1. ])
    """
    right = np.asarray(right)
    if not 1 <= k <= n or right.min(initial=0) < 0 or right.max(initial=0) > n:
        raise UserError(f"pass@{k} needs 1 to {n} samples to draw of {n}, and counts in 0 to {n}")
    # of c right ones: the product of 1 − k / i over i = n, n − 1, ..., n − c + 1, which
    # is 0 from i = k on
    missed = np.concatenate([[1.0], np.cumprod(1 - k / np.arange(n, 0, -1))])
    return 1 - missed[right]


def _statistics(metric: Metric, responses: Texts, references: Texts) -> Float[np.ndarray, "N K"]:
    if len(responses) != len(references):
        raise UserError(
            f"{len(responses)} responses cannot be compared with {len(references)} references"
        )
    if not len(responses):
        raise UserError("there are no responses to measure")
    return np.stack(
        [
            np.asarray(metric.rows(*row), np.float64)
            for row in zip(responses, references, strict=True)
        ]
    )


def _resampled(
    found: Float[np.ndarray, "N K"], seed: int, samples: int
) -> Float[np.ndarray, "S K"]:
    """Sums over as many rows as there are, drawn with replacement."""
    rng, rows = np.random.default_rng(seed), len(found)
    size = max(1, PIECE // rows)
    drawn = [
        rng.multinomial(rows, np.full(rows, 1 / rows), min(size, samples - start)) @ found
        for start in range(0, samples, size)
    ]
    return np.concatenate(drawn)


def _middle(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _jackknife(value: float, without: Float[np.ndarray, "N"], level: float) -> Interval:
    half = NormalDist().inv_cdf((1 + level) / 2) * float(
        np.sqrt((len(without) - 1) * without.var())
    )
    return value, value - half, value + half


def _grams(items: Sequence, n: int) -> Counter:
    return Counter(zip(*(items[k:] for k in range(n))))


def _ratio(sums: np.ndarray) -> np.ndarray:
    """First over second; the first where there is nothing to divide by, as jiwer has
    it.
    """
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def _mean(score: Callable[[str, str], float]) -> Metric:
    return Metric(lambda response, reference: np.array([score(response, reference), 1.0]), _ratio)


@cache
def _rouge(kind: str) -> Callable[[str, str], float]:
    return text.rouge(kind)


@cache
def _vader() -> Callable[[str], float]:
    return text.vader()


@cache
def _tokenizer() -> Callable[[str], str]:
    return text.import_extra("sacrebleu").BLEU().tokenizer


def _bleu_rows(response: str, reference: str) -> np.ndarray:
    """(words, words of the reference, n-grams in common, n-grams) for n of 1 to 4."""
    found, wanted = (_tokenizer()(x.rstrip()).split() for x in (response, reference))
    hits = [(_grams(found, n) & _grams(wanted, n)).total() for n in range(1, 5)]
    return np.array(
        [len(found), len(wanted), *hits, *(max(len(found) - n + 1, 0) for n in range(1, 5))]
    )


def _bleu(sums: np.ndarray) -> np.ndarray:
    """Papineni et al. 2002, https://aclanthology.org/P02-1040; the k-th order without a
    hit counts 1 / 2ᵏ of one.
    """
    found, wanted, hits, counts = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:]
    smooth = np.where(hits > 0, hits, 0.5 ** np.cumsum(hits == 0, -1))
    mean = np.log(smooth / np.maximum(counts, 1)).mean(-1)
    short = np.minimum(0.0, 1 - wanted / np.maximum(found, 1))
    return np.where((hits.sum(-1) > 0) & (counts.min(-1) > 0), 100 * np.exp(mean + short), 0.0)


def _chrf_rows(response: str, reference: str) -> np.ndarray:
    """(n-grams, those of the reference, those in common) of the letters without blanks,
    for n of 1 to 6.
    """
    rows = []
    for n in range(1, 7):
        found, wanted = (_grams("".join(x.split()), n) for x in (response, reference))
        rows += [found.total() if wanted else 0, wanted.total(), (found & wanted).total()]
    return np.array(rows)


def _chrf(sums: np.ndarray) -> np.ndarray:
    """F with β = 2 of the mean precision and recall over the orders that both sides
    have (https://aclanthology.org/W15-3049).
    """
    found, wanted, hits = np.moveaxis(sums.reshape(*sums.shape[:-1], 6, 3), -1, 0)
    both = (found > 0) & (wanted > 0)
    average = lambda counts: (
        np.where(both, hits / np.maximum(counts, 1), 0.0).sum(-1) / np.maximum(both.sum(-1), 1)
    )
    precision, recall = average(found), average(wanted)
    return (
        100 * 5 * precision * recall / np.where(precision + recall > 0, 4 * precision + recall, 1.0)
    )


def _edits(process: str, response: str, reference: str) -> np.ndarray:
    found = getattr(text.import_extra("jiwer"), process)(reference, response)
    kept = found.hits + found.substitutions + found.deletions
    return np.array([found.substitutions + found.deletions + found.insertions, kept])


def _entity_rows(response: str, reference: str) -> np.ndarray:
    """(entities in common, 1/2 those of both), for as many tags as the reference has:
    missing ones are O.
    """
    tags = reference.split()
    found, wanted = text.entities(response.split()[: len(tags)]), text.entities(tags)
    return np.array([2 * len(found & wanted), len(found) + len(wanted)])


def _named_rows(response: str, reference: str) -> np.ndarray:
    """(entities in common, 1/2 those of both), as `_entity_rows` has them; each is a
    text with its kind, and may stand twice.
    """
    listed = lambda text: Counter(
        item for part in text.split(";") if (item := " ".join(part.split())) not in ("", "none")
    )
    found, wanted = listed(response), listed(reference)
    return np.array([2 * (found & wanted).total(), found.total() + wanted.total()])


def _distinct(n: int) -> Metric:
    """`text.distinct` of the words: of all responses, without each of them (it alone
    may have some n-grams), and of one.
    """

    def whole(responses: Texts) -> tuple[float, np.ndarray]:
        rows = [_grams(response.split(), n) for response in responses]
        owners = Counter(gram for row in rows for gram in row)
        alone = np.array([sum(owners[gram] == 1 for gram in row) for row in rows])
        counts = np.array([row.total() for row in rows])
        share = lambda kinds, total: kinds / np.maximum(total, 1)
        return float(share(len(owners), counts.sum())), share(
            len(owners) - alone, counts.sum() - counts
        )

    return _mean(lambda response, reference: text.distinct([response.split()], n))._replace(
        whole=whole
    )


_same = _mean(lambda response, reference: response.strip() == reference.strip())

METRICS: dict[str, Metric] = {
    "exact": _same,
    "accuracy": _same,
    "answer_exact": _mean(text.exact_match),
    "answer_f1": _mean(text.answer_f1),
    "bleu": Metric(_bleu_rows, _bleu),
    "chrf": Metric(_chrf_rows, _chrf),
    **{
        kind: _mean(lambda *pair, kind=kind: _rouge(kind)(*pair))
        for kind in ("rouge1", "rouge2", "rougeL")
    },
    "wer": Metric(partial(_edits, "process_words"), _ratio),
    "cer": Metric(partial(_edits, "process_characters"), _ratio),
    "entity_f1": Metric(_entity_rows, _ratio),
    "named_f1": Metric(_named_rows, _ratio),
    "positivity": _mean(lambda response, reference: _vader()(response)),
    "distinct_1": _distinct(1),
    "distinct_2": _distinct(2),
    "length": _mean(lambda response, reference: len(response.split())),
    "repetition": _mean(lambda response, reference: text.repeated_share(response, 2)),
}
