"""The review sentences: text, ratings and the split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxppo.data import examples, sentiment
from jaxppo.data.fetch import FetchError


@pytest.fixture(scope="session")
def reviews() -> sentiment.Reviews:
    try:
        return sentiment.load()
    except FetchError as error:
        pytest.skip(str(error))


def test_real_sentences(reviews):
    # 10,605 lines, two of which repeat an earlier sentence
    assert len(reviews) == len(reviews.ratings) == len(set(reviews.texts)) == 10603
    assert reviews.ratings.dtype == np.float32
    assert reviews.ratings.min() >= -4 and reviews.ratings.max() <= 4
    assert reviews.texts[2] == "Effective but too tepid biopic" and reviews.ratings[
        2
    ] == np.float32(-0.6)
    assert (
        "Münch's genuine insight makes the film's occasional overindulgence forgivable."
        in reviews.texts
    )
    assert not any("&amp;" in text or "  " in text or "\ufffd" in text for text in reviews.texts)
    assert (np.abs(reviews.ratings) > 0.5).sum() > 10_000


def test_parse_keeps_the_first_of_equal_sentences():
    reviews = sentiment.parse(
        "1\t1.5\tSo so.\n2\t-2\tCafe\u0301.\n3\t3\tSo  so. \n4\t1\tCaf\u00e9.\n".encode()
    )
    assert reviews.texts == ["So so.", "Café."]
    assert reviews.ratings.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("line", [b"1\t0.5", b"1\tgood\ttext", b"1\t4.5\ttext", b"1\tnan\ttext"])
def test_parse_names_the_line(line):
    with pytest.raises(FetchError, match="line 2"):
        sentiment.parse(b"1\t0.5\tfine\n" + line)


@given(st.lists(st.text(max_size=3), max_size=60), st.integers(0, 5))
def test_split_is_a_partition_without_straddling(keys, seed):
    parts = examples.split_rows(keys, seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(keys)))
    train, validation, test = ({keys[row] for row in part} for part in parts)
    assert not train & validation and not train & test and not validation & test


def test_split_sizes_and_seed():
    keys = [str(i) for i in range(1000)]
    parts = examples.split_rows(keys, seed=0)
    assert [len(part) for part in parts] == [800, 100, 100]
    again, other = examples.split_rows(keys, seed=0), examples.split_rows(keys, seed=1)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    # of 100 test rows, about 10 are in another seed's test part
    assert len(np.intersect1d(parts.test, other.test)) < 30


def test_split_does_not_depend_on_the_order_of_rows():
    keys = [str(i) for i in range(50)]
    forward, backward = examples.split_rows(keys, seed=3), examples.split_rows(keys[::-1], seed=3)
    assert [keys[i] for i in forward.test] == [keys[::-1][i] for i in backward.test]


def test_split_is_pinned():
    # a change here would move test sentences into training for everybody
    assert examples.split_rows(list("abcdefghij"), seed=0).test.tolist() == [4]
