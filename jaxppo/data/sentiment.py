"""10,605 sentences of movie reviews with human ratings, from vaderSentiment 0.5 (MIT).

Each is the mean of about twenty people's, from -4 (extremely negative) to 4 (Hutto &
Gilbert 2014, https://ojs.aaai.org/index.php/ICWSM/article/view/14550).
"""

import html
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Split, split_rows
from jaxppo.data.fetch import fetch

OPENING_TOKENS = 8  # of a sentence: the main job's prompt


@dataclass(frozen=True)
class Reviews:
    """Sentences and their mean human ratings."""

    texts: list[str]
    ratings: Float32[np.ndarray, "N"]  # -4 .. 4

    def __len__(self) -> int:
        return len(self.texts)


def load_reviews() -> Reviews:
    """Load every distinct sentence; downloaded on first use (2.4 MB)."""
    inner = read_member(fetch("vader-sentences"), "*/hutto_ICWSM_2014.tar.gz")
    return parse_reviews(read_member(inner, "*/movieReviewSnippets_GroundTruth.txt"))


def parse_reviews(data: bytes) -> Reviews:
    """Parse lines `number TAB rating TAB sentence`, without later copies.

    >>> reviews = parse_reviews(
    ...     b"1\\t2.5\\tA &amp; B\\r\\n2\\t-3\\tC\\r\\n3\\t1\\tA  &amp; B"
    ... )
    >>> reviews.texts, reviews.ratings.tolist()
    (['A & B', 'C'], [2.5, -3.0])
    """
    rows: dict[str, float] = {}
    for line in data.decode("utf-8-sig").splitlines():
        _, rating, text = line.split("\t")
        rows.setdefault(normalise_text(text), float(rating))
    return Reviews(texts=list(rows), ratings=np.asarray(list(rows.values()), np.float32))


def normalise_text(text: str) -> str:
    """Return text with composed characters and single spaces, without HTML entities."""
    return " ".join(unicodedata.normalize("NFC", html.unescape(text)).split())


def split_by_opening(
    texts: Sequence[str], encode: Callable[[str], list[int]], *, tokens: int = OPENING_TOKENS
) -> Split:
    """Split by the first `tokens` ids, so that a prompt is never in two parts."""
    return split_rows([" ".join(map(str, encode(text)[:tokens])) for text in texts])
