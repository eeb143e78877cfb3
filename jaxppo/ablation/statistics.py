"""What several seeds say: means that one lucky seed does not move, intervals, and
differences between two ways to train.

Scores are arrays [tasks, seeds]; a single task is one row. Means and intervals follow
Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical
precipice" (https://arxiv.org/abs/2108.13264): the interquartile mean, and a bootstrap
that draws seeds anew within each task. Runs that diverged are in the scores like any
other.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit
from scipy.stats import trim_mean

from jaxppo.rewards import text

EXACT = 12  # with so many pairs or fewer all 2ⁿ sign flips are tried
FEW = 6  # seeds, below which no permutation can fall below .05
Interval = tuple[float, float, float]  # value, low, high
Scores = Float[np.ndarray, "tasks seeds"]


def iqm(scores: Float[np.ndarray, "... N"]) -> Float[np.ndarray, "..."]:
    """The interquartile mean over the last axis: without the lowest and the highest
    quarter.

    >>> float(iqm(np.array([0.0, 1.0, 2.0, 99.0])))
    1.5
    """
    return np.asarray(trim_mean(scores, 0.25, axis=-1))


def mean(scores: Float[np.ndarray, "... N"]) -> Float[np.ndarray, "..."]:
    """The mean over the last axis."""
    return np.mean(scores, -1)


def bootstrap(
    scores: Scores,
    statistic: Callable[[np.ndarray], np.ndarray] = mean,
    *,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """(value, low, high) of a statistic of all scores together: percentile bootstrap
    that draws as many seeds with replacement, within each task (stratified).
    """
    scores, rng = np.atleast_2d(np.asarray(scores, np.float64)), np.random.default_rng(seed)
    chosen = rng.integers(0, scores.shape[1], (draws, *scores.shape))
    drawn = statistic(np.take_along_axis(scores[None], chosen, 2).reshape(draws, -1))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(np.ravel(scores))), float(low), float(high)


def permutation_p(
    differences: Sequence[float] | np.ndarray, *, seed: int = 0, draws: int = 2**EXACT
) -> float:
    """Two-sided p of a mean difference of pairs: how often a mean with signs thrown at
    random is at least as far from 0. Exact for up to 12 pairs, so never below 2 / 2ⁿ;
    for more, over draws and the one that was seen. NaN where a difference is no finite
    number.

    >>> permutation_p([1.0, 2.0, 3.0])  # + + + and - - - of eight
    0.25
    """
    found = np.ravel(np.asarray(differences, np.float64))
    if not np.isfinite(found).all():
        return float("nan")
    if len(found) <= EXACT:
        signs = np.array(list(product([1, -1], repeat=len(found))))
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (draws - 1, len(found))) * 2 - 1
        signs = np.concatenate([np.ones((1, len(found))), drawn])
    means = np.abs(signs @ found)
    return float(np.mean(means >= abs(found.sum()) * (1 - 1e-12)))


class Difference(NamedTuple):
    """One way to train less another, over the same tasks and seeds."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def decided(self) -> int:
        """+1, -1, or 0 where the interval holds 0 or, with enough runs for one, a
        permutation test would not rule it out.
        """
        sure = self.low > 0 or self.high < 0
        return int(np.sign(self.mean)) if sure and (np.isnan(self.p) or self.p <= 0.05) else 0


def over_seeds(scores: Scores) -> Interval:
    """The mean with a 95 % interval: Student's t over the seeds, each of which counts
    once, whatever the number of tasks.

    A seed gives all tasks the same network and noise, so that its scores are no
    independent runs; and a percentile bootstrap of eight numbers is too narrow.
    """
    return mean_interval(np.atleast_2d(np.asarray(scores, np.float64)).mean(0).tolist())


def difference(one: Scores, other: Scores) -> Difference:
    """one − other with a 95 % interval, each seed against the same seed (`over_seeds`).
    p is of sign flips of whole seeds; with fewer than 6 there is none, since a
    permutation of so few could not fall below .05.
    """
    pairs = np.atleast_2d(np.asarray(one, np.float64)) - np.atleast_2d(
        np.asarray(other, np.float64)
    )
    p = permutation_p(pairs.mean(0)) if pairs.shape[1] >= FEW else float("nan")
    return Difference(*over_seeds(pairs), p=p)


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """(mean, low, high) over seeds: mean ± t · s / √n with Student's t of n − 1 degrees
    of freedom, s with ddof 1; without end for a single seed. (A bootstrap of three or
    five numbers is far too narrow.)

    >>> mean_interval([1.0, 2.0, 3.0])  # 2 ± 4.303 / √3
    (2.0, -0.48..., 4.48...)
    """
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return mean, -np.inf, np.inf
    half = float(stdtrit(count - 1, (1 + level) / 2)) * text.standard_error(values)
    return mean, mean - half, mean + half
