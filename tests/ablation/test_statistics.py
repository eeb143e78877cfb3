import numpy as np
import pytest
from scipy import stats

from jaxppo.ablation import statistics

RNG = np.random.default_rng(0)


def test_iqm_leaves_out_a_quarter_on_both_sides():
    assert (
        statistics.iqm(np.array([9.0, 1.0, 5.0, 3.0, 100.0, -50.0, 4.0, 2.0]))
        == (2 + 3 + 4 + 5) / 4
    )
    # over all tasks together, not task by task
    scores = np.array([[0.0, 1.0], [2.0, 99.0]])
    assert (
        statistics.bootstrap(scores, statistics.iqm)[0] == 1.5
        and statistics.bootstrap(scores)[0] == 25.5
    )


def test_bootstrap_of_a_normal_sample_is_as_wide_as_theory_says():
    scores = RNG.standard_normal((1, 400))
    value, low, high = statistics.bootstrap(scores, seed=1)
    assert value == pytest.approx(scores.mean())
    half = 1.96 * scores.std() / 20  # √400
    assert high - low == pytest.approx(2 * half, rel=0.1)
    assert statistics.bootstrap(scores, seed=1) == (value, low, high)  # the same draws
    assert statistics.bootstrap(scores, seed=2) != (value, low, high)


def test_bootstrap_draws_within_tasks():
    """One task at 0, one at 1: drawn within each task, the mean never moves."""
    scores = np.array([[0.0] * 5, [1.0] * 5])
    assert statistics.bootstrap(scores) == (0.5, 0.5, 0.5)
    assert statistics.bootstrap(scores, statistics.iqm) == (0.5, 0.5, 0.5)


def test_bootstrap_covers_the_mean():
    """About 95 % of 200 intervals hold the mean, 0; slightly fewer, because samples have only 20
    values.
    """
    samples = np.random.default_rng(3).standard_normal((200, 1, 20))
    hits = [
        low <= 0 <= high for _, low, high in (statistics.bootstrap(x, draws=400) for x in samples)
    ]
    assert 0.88 <= np.mean(hits) <= 0.99


@pytest.mark.parametrize("count", [5, 8, 12])
def test_permutation_test_is_exact(count):
    x = RNG.standard_normal(count) + 0.5
    want = stats.permutation_test(
        (x,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert statistics.permutation_p(x) == pytest.approx(want)


def test_no_p_without_finite_differences():
    assert np.isnan(statistics.permutation_p([1.0, np.nan, 1.0]))
    found = statistics.paired_difference(np.array([[1.0] * 7 + [np.nan]]), np.zeros((1, 8)))
    assert np.isnan(found.p) and found.decided == 0


def test_permutation_test_of_many_pairs():
    x = RNG.standard_normal(40) + 0.3
    want = stats.ttest_1samp(x, 0).pvalue
    assert statistics.permutation_p(x) == pytest.approx(want, abs=0.03)
    # of 4,096 draws and the sample itself, the sample alone
    assert statistics.permutation_p(np.ones(40)) == 1 / (2**12 + 1)
    assert statistics.permutation_p(np.zeros(40)) == 1.0


def test_a_true_difference_is_decided():
    one = RNG.standard_normal((4, 8))
    noise = 0.1 * RNG.standard_normal((4, 8))
    found = statistics.paired_difference(one + 0.2 + noise, one)
    assert found.low < 0.2 < found.high and found.p == 2 / 2**8  # eight seeds, all of one sign
    assert found.decided == 1 and statistics.paired_difference(one, one + 0.2 + noise).decided == -1


def test_no_difference():
    one = RNG.standard_normal((2, 8))
    same = statistics.paired_difference(one, one)
    assert same == (0, 0, 0, 1) and same.decided == 0
    found = statistics.paired_difference(RNG.standard_normal((4, 8)), RNG.standard_normal((4, 8)))
    assert found.decided == 0


def test_few_seeds_have_wide_intervals():
    found = statistics.paired_difference(np.array([[1.0, 2.0, 3.0]]), np.zeros((1, 3)))
    assert found[:3] == pytest.approx(
        (2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3
    )  # t of 2 degrees of freedom
    assert np.isnan(found.p) and found.decided == 0
    assert statistics.paired_difference(np.array([[1.0, 1.1, 1.2]]), np.zeros((1, 3))).decided == 1


def test_one_seed_decides_nothing():
    """However many tasks there are, because they share the seed's network and noise."""
    assert statistics.paired_difference(np.ones((1, 1)), np.zeros((1, 1))).decided == 0
    assert statistics.paired_difference(np.ones((4, 1)), np.zeros((4, 1))).decided == 0


@pytest.mark.parametrize("tasks", [1, 4])
def test_eight_seeds_cover_the_difference(tasks):
    """Of 600 comparisons without a difference one in twenty is decided, although the tasks of a
    seed are correlated: s.e. .009.
    """
    rng = np.random.default_rng(5)
    seeds = rng.standard_normal((600, 1, 8)) + 0.3 * rng.standard_normal((600, tasks, 8))
    found = [statistics.paired_difference(x, np.zeros_like(x)) for x in seeds]
    assert 0.02 <= np.mean([not x.low <= 0 <= x.high for x in found]) <= 0.08
    assert 0.02 <= np.mean([x.decided != 0 for x in found]) <= 0.08
