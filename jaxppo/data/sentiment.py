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

from jaxppo.data.archives import member
from jaxppo.data.examples import Split, split_rows
from jaxppo.data.fetch import FetchError, fetch

OPENING = 8  # tokens of a sentence that are the main job's prompt


@dataclass(frozen=True)
class Reviews:
    """Sentences and their mean human ratings, row by row."""

    texts: list[str]
    ratings: Float32[np.ndarray, "N"]  # -4 .. 4

    def __len__(self) -> int:
        return len(self.texts)


def load() -> Reviews:
    """Every distinct sentence once, in the file's order; downloaded on first use (2.4
    MB).

    Raises:
        FetchError: when the download fails or the file is not what it should be.
    """
    inner = member(fetch("vader-sentences"), "*/hutto_ICWSM_2014.tar.gz")
    return parse(member(inner, "*/movieReviewSnippets_GroundTruth.txt"))


def parse(data: bytes) -> Reviews:
    """Read lines of `number TAB rating TAB sentence` in UTF-8; the first of equal
    sentences stays.

    >>> reviews = parse(
    ...     b"1\\t2.5\\tFunny &amp; warm.\\r\\n2\\t-3\\tDull.\\r\\n3\\t1\\tFunny  &amp; warm.\\r\\n"
    ... )
    >>> reviews.texts, reviews.ratings.tolist()
    (['Funny & warm.', 'Dull.'], [2.5, -3.0])
    """
    rows: dict[str, float] = {}
    for number, line in enumerate(data.decode("utf-8-sig").splitlines(), 1):
        fields = line.split("\t")
        try:
            _, rating, text = fields
            value = float(rating)
        except ValueError:
            raise FetchError(
                f"line {number} of the review sentences is not 'number, rating, text'"
            ) from None
        if not -4 <= value <= 4:
            raise FetchError(
                f"line {number} of the review sentences has the rating {value}, outside -4..4"
            )
        rows.setdefault(clean(text), value)
    return Reviews(texts=list(rows), ratings=np.asarray(list(rows.values()), np.float32))


def clean(text: str) -> str:
    """One spelling for each sentence: no HTML entities, composed characters, single
    spaces.

    >>> clean("PB&amp;J  sandwich ")
    'PB&J sandwich'
    """
    return " ".join(unicodedata.normalize("NFC", html.unescape(text)).split())


def split_by_opening(
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    tokens: int = OPENING,
    seed: int = 0,
) -> Split:
    """`split` by the first `tokens` token ids: prompts that are cut from the texts are
    never seen in two parts. Scripts that train on these sentences before others test on
    them use the same split.
    """
    return split_rows([" ".join(map(str, encode(text)[:tokens])) for text in texts], seed=seed)
