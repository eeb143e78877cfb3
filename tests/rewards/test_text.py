import sys

import pytest

from jaxppo.config import UserError
from jaxppo.rewards import text


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
    with pytest.raises(UserError, match=r"pip install .*jaxppo\[demo\]"):
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
