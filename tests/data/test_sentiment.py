"""The review sentences: text and ratings."""

import numpy as np
import pytest

from jaxppo.data import sentiment
from jaxppo.data.fetch import FetchError


@pytest.fixture(scope="session")
def reviews() -> sentiment.Reviews:
    try:
        return sentiment.load_reviews()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.ci
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
    reviews = sentiment.parse_reviews(
        "1\t1.5\tSo so.\n2\t-2\tCafe\u0301.\n3\t3\tSo  so. \n4\t1\tCaf\u00e9.\n".encode()
    )
    assert reviews.texts == ["So so.", "Café."]
    assert reviews.ratings.tolist() == [1.5, -2.0]


def test_texts_with_the_same_opening_stay_together():
    texts = [f"{i % 40} {i}" for i in range(200)]
    encode = lambda text: [int(word) for word in text.split()]
    parts = sentiment.split_by_opening(texts, encode, tokens=1)
    openings = [{texts[i].split()[0] for i in part} for part in parts]
    assert all(openings) and sum(map(len, openings)) == len(set.union(*openings)) == 40
