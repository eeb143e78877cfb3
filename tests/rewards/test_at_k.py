import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.errors import UserError
from jaxppo.rewards import at_k


def test_pass_at_k_by_counting():
    """1 − C(n − c, k) / C(n, k), and its mean over binomial counts is 1 − (1 − p)ᵏ: nothing is
    added by the estimate.
    """
    for n in (1, 5, 20):
        for k in range(1, n + 1):
            got = at_k.pass_at_k(np.arange(n + 1), n, k)
            want = [1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)]
            np.testing.assert_allclose(got, want, atol=1e-12)
            chance = [math.comb(n, c) * 0.3**c * 0.7 ** (n - c) for c in range(n + 1)]
            assert got @ chance == pytest.approx(1 - 0.7**k)


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right):
    """Of all subsets of k samples. So pass@1 is the mean, and more samples never hurt."""
    n, count = len(right), np.array([sum(right)])
    found = [float(at_k.pass_at_k(count, n, k)[0]) for k in range(1, n + 1)]
    subsets = [[any(x) for x in itertools.combinations(right, k)] for k in range(1, n + 1)]
    assert found == pytest.approx([sum(x) / len(x) for x in subsets])
    assert found[0] == pytest.approx(sum(right) / n)
    assert all(more >= less - 1e-12 for less, more in itertools.pairwise(found))


def test_pass_at_k_of_counts_that_cannot_be():
    for right, n, k in (([1], 4, 5), ([1], 4, 0), ([5], 4, 1), ([-1], 4, 1)):
        with pytest.raises(UserError, match=f"pass@{k} needs"):
            at_k.pass_at_k(np.array(right), n, k)


def test_the_powers_end_at_the_number_of_samples():
    names = lambda n: [*at_k.pass_at_powers(np.ones((2, n), bool))]
    assert names(1) == ["pass@1"]
    assert names(6) == ["pass@1", "pass@2", "pass@4", "pass@6"]
    assert names(8) == ["pass@1", "pass@2", "pass@4", "pass@8"]


def test_the_most_frequent_text_is_that_of_its_first_sample():
    assert at_k.majority(["a", "b", "b"]) == 1
    assert at_k.majority(["b", "a", "a", "b"]) == 0  # as often: the first
    assert at_k.majority(["x", "4", " 4\n"]) == 1  # outer spaces do not count
    assert at_k.majority([""]) == 0


def test_a_summary():
    """Two prompts, three samples each, of which one is right. The first one's majority is
    wrong, the other's three texts occur once: its first is right.
    """
    scores = np.array([[1.5, 0.0, 0.0], [1.0, 0.5, 0.0]], np.float32)
    texts = [["a", "b", "b"], ["c", "d", "e"]]
    found = at_k.summarise(scores, texts, least=1.0)
    # 1 of 3 right: C(2, 2) / C(3, 2) = 1 / 3 miss
    want = {"avg@3": 0.5, "maj@3": 0.5, "pass@1": 1 / 3, "pass@2": 2 / 3, "pass@3": 1.0}
    assert found == pytest.approx(want)
    assert at_k.summarise(scores, texts, least=0.0)["pass@1"] == 1  # the least score counts
    tenths = np.full((1, 2), 0.9, np.float32)  # .899999976
    assert at_k.summarise(tenths, [["a", "b"]], least=0.9)["pass@1"] == 1
