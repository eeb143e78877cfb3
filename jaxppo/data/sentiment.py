"""10,605 sentences of movie reviews with human ratings, from the source package of vaderSentiment 0.5 (MIT).

Each rating is the mean of about twenty people's, from -4 (extremely negative) to 4 (extremely positive):
Hutto & Gilbert 2014, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text,
https://ojs.aaai.org/index.php/ICWSM/article/view/14550
"""

import hashlib
import html
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from jaxppo.archives import member
from jaxppo.fetch import FetchError, fetch

OPENING = 8  # tokens of a sentence that are the main job's prompt


@dataclass(frozen=True)
class Reviews:
    """Sentences and their mean human ratings, row by row."""

    texts: list[str]
    ratings: Float32[np.ndarray, "N"]  # -4 .. 4

    def __len__(self) -> int:
        return len(self.texts)


class Split(NamedTuple):
    """Row numbers of three disjoint parts."""

    train: Int64[np.ndarray, "a"]
    validation: Int64[np.ndarray, "b"]
    test: Int64[np.ndarray, "c"]


def load() -> Reviews:
    """Every distinct sentence once, in the file's order; downloaded on first use (2.4 MB).

    Raises:
        FetchError: when the download fails or the file is not what it should be.
    """
    inner = member(fetch("vader-sentences"), "*/hutto_ICWSM_2014.tar.gz")
    return parse(member(inner, "*/movieReviewSnippets_GroundTruth.txt"))


def parse(data: bytes) -> Reviews:
    """Read lines of `number TAB rating TAB sentence` in UTF-8; the first of equal sentences stays.

    >>> reviews = parse(b"1\\t2.5\\tFunny &amp; warm.\\r\\n2\\t-3\\tDull.\\r\\n3\\t1\\tFunny  &amp; warm.\\r\\n")
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
            raise FetchError(f"line {number} of the review sentences is not 'number, rating, text'") from None
        if not -4 <= value <= 4:
            raise FetchError(f"line {number} of the review sentences has the rating {value}, outside -4..4")
        rows.setdefault(clean(text), value)
    return Reviews(texts=list(rows), ratings=np.asarray(list(rows.values()), np.float32))


def clean(text: str) -> str:
    """One spelling for each sentence: no HTML entities, composed characters, single spaces.

    >>> clean("PB&amp;J  sandwich ")
    'PB&J sandwich'
    """
    return " ".join(unicodedata.normalize("NFC", html.unescape(text)).split())


def split(keys: Sequence[str], *, seed: int, fractions: tuple[float, float] = (0.8, 0.1)) -> Split:
    """Split rows into train, validation and test (80, 10 and 10 % by default); rows with equal keys stay together.

    The key is what must not be seen twice: the sentence, or the prompt that is cut from it. Rows are placed by a hash
    of the seed and the key, so the parts hold the same sentences on every machine and with every version of NumPy.

    Args:
        keys: [N] one string for each row.
        seed: another seed gives another split.
        fractions: of train and validation; test is the rest.

    >>> [part.tolist() for part in split(["a", "b", "a", "c", "d"], seed=0, fractions=(0.6, 0.2))]
    [[4, 0, 2], [3], [1]]
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[hashlib.sha256(f"{seed}:{key}".encode()).digest()].append(row)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    limits = (fractions[0] * len(keys), (fractions[0] + fractions[1]) * len(keys))
    placed = 0
    for _, rows in sorted(groups.items()):
        parts[sum(placed >= limit - 1e-9 for limit in limits)].extend(rows)
        placed += len(rows)
    return Split(*(np.asarray(part, np.int64) for part in parts))


def split_by_opening(texts: Sequence[str], encode: Callable[[str], list[int]], *, tokens: int = OPENING, seed: int = 0) -> Split:
    """`split` by the first `tokens` token ids: prompts that are cut from the texts are never seen in two parts. Scripts that
    train on these sentences before others test on them use the same split."""
    return split([" ".join(map(str, encode(text)[:tokens])) for text in texts], seed=seed)
