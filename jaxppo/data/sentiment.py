"""10,605 sentences of movie reviews with human ratings, from the source package of
vaderSentiment 0.5 (MIT).

Each rating is the mean of about twenty people's, from -4 (extremely negative) to 4
(extremely positive): Hutto & Gilbert 2014, VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text,
https://ojs.aaai.org/index.php/ICWSM/article/view/14550
"""

import html
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from jaxppo.data.archives import read_member
from jaxppo.data.examples import Split, split_rows
from jaxppo.data.fetch import FetchError, fetch

OPENING_TOKENS = 8  # of a sentence: the main job's prompt


@dataclass(frozen=True)
class Reviews:
    """Sentences and their mean human ratings."""

    texts: list[str]
    ratings: Float32[np.ndarray, "N"]  # -4 .. 4

    def __len__(self) -> int:
        return len(self.texts)


def load_reviews() -> Reviews:
    """Load every distinct sentence, in the file's order; downloaded on first use (2.4
    MB).

    Raises:
        FetchError: when the download fails or the file is damaged.
    """
    inner = read_member(fetch("vader-sentences"), "*/hutto_ICWSM_2014.tar.gz")
    return parse_reviews(read_member(inner, "*/movieReviewSnippets_GroundTruth.txt"))


def parse_reviews(data: bytes) -> Reviews:
    """Parse lines of `number TAB rating TAB sentence` in UTF-8. Of equal sentences the
    first is kept.

    >>> reviews = parse_reviews(
    ...     b"1\\t2.5\\tA &amp; B\\r\\n2\\t-3\\tC\\r\\n3\\t1\\tA  &amp; B"
    ... )
    >>> reviews.texts, reviews.ratings.tolist()
    (['A & B', 'C'], [2.5, -3.0])
    """
    rows: dict[str, float] = {}
    for number, line in enumerate(data.decode("utf-8-sig").splitlines(), 1):
        try:
            _, rating, text = line.split("\t")
            value = float(rating)
        except ValueError:
            raise FetchError(
                f"line {number} of the review sentences is not 'number, rating, text'"
            ) from None
        if not -4 <= value <= 4:
            raise FetchError(
                f"line {number} of the review sentences has the rating {value}, outside -4..4"
            )
        rows.setdefault(normalise_text(text), value)
    return Reviews(texts=list(rows), ratings=np.asarray(list(rows.values()), np.float32))


def normalise_text(text: str) -> str:
    """Return the text without HTML entities, with composed characters and single
    spaces.

    >>> normalise_text("PB&amp;J  sandwich ")
    'PB&J sandwich'
    """
    return " ".join(unicodedata.normalize("NFC", html.unescape(text)).split())


def split_by_opening(
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    tokens: int = OPENING_TOKENS,
    seed: int = 0,
) -> Split:
    """Split texts by their first `tokens` token ids, so that a prompt is never in two
    parts. All scripts that train on these sentences use this split.
    """
    return split_rows([" ".join(map(str, encode(text)[:tokens])) for text in texts], seed=seed)
