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


def test_tag_names():
    assert (
        len(entities.TAG_NAMES) == len(set(entities.TAG_NAMES)) == 21
    )  # O, and B and I of ten kinds
    assert entities.TAG_NAMES[:3] == ("O", "B-company", "I-company")


@pytest.mark.parametrize(
    "line", [b"word", b"word\tB-planet", b"\tO", b"two words\tO", b"word\tO\tO"]
)
def test_parse_names_the_line(line):
    with pytest.raises(FetchError, match="line 10 .* not 'word TAB tag'"):
        entities.parse(TWEETS + line)


@pytest.mark.parametrize(
    "lines",
    [
        b"\nx\tI-person",
        b"a\tB-movie\nx\tI-person",
        b"a\tO\nx\tI-person",
        b"a\tB-person\n\t\nx\tI-person",
    ],
)
def test_an_entity_begins(lines):
    with pytest.raises(FetchError, match=r"did not begin \(I-person\)"):
        entities.parse(lines)


def test_empty():
    with pytest.raises(FetchError, match="no examples in the tagged sentences"):
        entities.parse(b"\n\t\n")


@pytest.fixture(scope="module")
def real():
    try:
        return entities.load()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.ci
def test_real_tweets(real):
    rows = [row for part in real for row in part]
    assert [len(part) for part in real] == [1836, 230, 229]  # 2,295 of 2,394 differ
    assert {tag for row in rows for tag in row.extra["tags"]} == set(entities.TAG_NAMES)
    assert all(len(row.prompt.split()) == len(row.reference.split()) for row in rows)
