"""Tagged sentences: as many tags as words, and every tag one that is known."""

import pytest

from jaxppo.data.fetch import FetchError
from jaxppo.tasks.datasets import entities

TWEETS = b"""I\tO
love\tO
New\tB-geo-loc
York\tI-geo-loc
Yankees\tB-sportsteam
\t
Wow\tO
\t
Wow\tO
"""


def test_parse():
    first, second = entities.parse(TWEETS)  # the second "Wow" is the same sentence
    assert first.prompt == "I love New York Yankees"
    assert first.reference == "O O B-geo-loc I-geo-loc B-sportsteam"
    assert (
        first.extra["words"] == first.prompt.split()
        and first.extra["tags"] == first.reference.split()
    )
    assert (second.prompt, second.reference) == ("Wow", "O")
    assert entities.parse(TWEETS.replace(b"\n", b"\r\n")) == [first, second]


@pytest.fixture(scope="module")
def real():
    try:
        return entities.load()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.ci
def test_real_tweets(real):
    kinds = ["company", "facility", "geo-loc", "movie", "musicartist"]
    kinds += ["other", "person", "product", "sportsteam", "tvshow"]
    rows = [row for part in real for row in part]
    assert [len(part) for part in real] == [1836, 230, 229]  # 2,295 of 2,394 differ
    assert {tag for row in rows for tag in row.extra["tags"]} == {
        "O",
        *(f"{x}-{kind}" for x in "BI" for kind in kinds),
    }
    assert all(len(row.prompt.split()) == len(row.reference.split()) for row in rows)
