"""Statistics over seeds: robust means, intervals, and paired differences.

Scores are arrays [tasks, seeds]; a single task is one row. Means and intervals follow
Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical
precipice" (https://arxiv.org/abs/2108.13264): the interquartile mean, and a bootstrap
that draws seeds within each task. Runs that diverged count like any other.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from jaxppo.rewards import text

LEVEL = 0.95  # of all intervals
MIN_SEEDS_FOR_P = 6  # with fewer, no permutation test can fall below .05
Interval = tuple[float, float, float]  # value, low, high
Scores = Float[np.ndarray, "tasks seeds"]


def iqm(scores: Float[np.ndarray, "... N"]) -> Float[np.ndarray, "..."]:
    """The interquartile mean over the last axis: the mean without the lowest and the
    highest quarter.

    >>> float(iqm(np.array([0.0, 1.0, 2.0, 99.0])))
    1.5
    """
    return np.asarray(stats.trim_mean(scores, 0.25, axis=-1))


def bootstrap(
    scores: Scores,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda x: np.mean(x, -1),
    *,
    seed: int = 0,
    draws: int = 2000,
) -> Interval:
    """(value, low, high) of a statistic of all scores: percentile bootstrap, stratified
    by task.
    """
    scores, rng = np.atleast_2d(np.asarray(scores, np.float64)), np.random.default_rng(seed)
    chosen = rng.integers(0, scores.shape[1], (draws, *scores.shape))
    drawn = statistic(np.take_along_axis(scores[None], chosen, 2).reshape(draws, -1))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(statistic(np.ravel(scores))), float(low), float(high)


def permutation_p(differences: Sequence[float] | np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p-value of a mean of paired differences, from random sign flips. Exact
    for up to 12 pairs, so at least 2 / 2ⁿ. NaN if a difference is not finite.

    >>> permutation_p([1.0, 2.0, 3.0])  # + + + and - - - of eight
    0.25
    """
    found = np.ravel(np.asarray(differences, np.float64))
    if not np.isfinite(found).all():
        return float("nan")
    size = lambda x, axis: np.abs(np.mean(x, axis))
    test = stats.permutation_test(
        (found,),
        size,
        permutation_type="samples",
        alternative="greater",
        n_resamples=2**12,
        rng=seed,
    )
    return float(test.pvalue)


class Difference(NamedTuple):
    """The difference between two arms, over the same tasks and seeds."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def decided(self) -> int:
        """The sign of the difference, or 0 if it is not significant: if the interval
        holds 0, or p is above .05.
        """
        sure = self.low > 0 or self.high < 0
        return int(np.sign(self.mean)) if sure and (np.isnan(self.p) or self.p <= 0.05) else 0


def mean_over_seeds(scores: Scores) -> Interval:
    """The mean with a 95 % interval: Student's t over the seeds' means over tasks.

    A seed has the same network and noise on all tasks, so its scores are not
    independent; and a percentile bootstrap of eight values is too narrow.
    """
    return mean_interval(np.atleast_2d(np.asarray(scores, np.float64)).mean(0).tolist())


def paired_difference(one: Scores, other: Scores) -> Difference:
    """one − other, seed by seed, with a 95 % interval (`mean_over_seeds`). p is from
    sign flips of whole seeds; NaN with fewer than 6 seeds.
    """
    pairs = np.atleast_2d(one).astype(np.float64) - np.atleast_2d(other).astype(np.float64)
    p = permutation_p(pairs.mean(0)) if pairs.shape[1] >= MIN_SEEDS_FOR_P else float("nan")
    return Difference(*mean_over_seeds(pairs), p=p)


def mean_interval(values: Sequence[float]) -> Interval:
    """(mean, low, high): mean ± t · s / √n, with Student's t of n − 1 degrees of
    freedom and s with ddof 1. Infinite for a single value.

    >>> mean_interval([1.0, 2.0, 3.0])  # 2 ± 4.303 / √3
    (2.0, -0.48..., 4.48...)
    """
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return mean, -np.inf, np.inf
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * text.standard_error(values)
    return mean, mean - half, mean + half
