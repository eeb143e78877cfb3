"""Judges and metrics of decoded text, on the host."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxppo.config import UserError


def vader() -> Callable[[str], float]:
    """VADER's compound sentiment of a text, in [-1, 1] (Hutto & Gilbert 2014, https://ojs.aaai.org/index.php/ICWSM/article/view/14550).

    A lexicon with rules: nothing in it is trained. Raises UserError when the package is missing.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError('VADER is not installed; pip install "jaxppo[demo]"') from error
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def distinct(rows: Sequence[Sequence[int]], n: int, *, tokens: int | None = None) -> float:
    """Distinct n-grams / n-grams over the rows (Li et al. 2016, https://arxiv.org/abs/1510.03055); n-grams do not cross rows.

    `tokens` cuts the rows, taken in order, after that many tokens in all: the measure falls with the amount of text, so
    compare equal amounts.

    >>> distinct([[1, 2, 1, 2], [1, 2]], 2)  # 12, 21, 12, 12: two of four
    0.5
    """
    grams, used = [], 0
    for row in rows:
        row = list(row) if tokens is None else list(row)[: max(tokens - used, 0)]
        used += len(row)
        grams += [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean.

    >>> standard_error([1.0, 2.0, 3.0])  # std 1, over sqrt 3
    0.577...
    """
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
