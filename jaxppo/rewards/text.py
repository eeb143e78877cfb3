"""Judges and metrics of decoded text, on the host.

Judges of a response alone, and of a response and its reference; what needs a package is
made by a function that imports it.
"""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from jaxppo.errors import UserError

PUNCTUATION = frozenset(string.punctuation)  # of ASCII alone, as in SQuAD's script


def vader() -> Callable[[str], float]:
    """VADER's compound sentiment of a text, in [-1, 1] (Hutto & Gilbert 2014,
    https://ojs.aaai.org/index.php/ICWSM/article/view/14550).

    A lexicon with rules: nothing in it is trained. Raises UserError when the package is
    missing.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError('VADER is not installed; pip install -e ".[demo]"') from error
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def distinct(rows: Sequence[Sequence[Hashable]], n: int, *, tokens: int | None = None) -> float:
    """Distinct n-grams / n-grams over the rows (Li et al. 2016,
    https://arxiv.org/abs/1510.03055); n-grams do not cross rows.

    `tokens` cuts the rows, taken in order, after that many tokens in all: the measure
    falls with the amount of text, so compare equal amounts.

    >>> distinct([[1, 2, 1, 2], [1, 2]], 2)  # 12, 21, 12, 12: two of four
    0.5
    """
    grams, used = [], 0
    for row in rows:
        row = list(row) if tokens is None else list(row)[: max(tokens - used, 0)]
        used += len(row)
        grams += [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean.

    >>> standard_error([1.0, 2.0, 3.0])  # std 1, over sqrt 3
    0.577...
    """
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def sentence_bleu() -> Callable[[str, str], float]:
    """BLEU of a response against its reference in [0, 1], by sacrebleu: tokenizer 13a,
    smoothing "exp", effective order.
    """
    bleu = library("sacrebleu").BLEU(effective_order=True)
    return lambda response, reference: bleu.sentence_score(response, [reference]).score / 100


def chrf() -> Callable[[str, str], float]:
    """chrF2 in [0, 1], by sacrebleu: F of character n-grams up to 6 (Popović 2015,
    https://aclanthology.org/W15-3049).
    """
    metric = library("sacrebleu").CHRF()
    return lambda response, reference: metric.sentence_score(response, [reference]).score / 100


def rouge(kind: str) -> Callable[[str, str], float]:
    """The F-measure of rouge1, rouge2 or rougeL in [0, 1], by rouge-score without
    stemmer; its words are of a-z and 0-9.
    """
    scorer = library("rouge_score.rouge_scorer").RougeScorer([kind])
    return lambda response, reference: float(scorer.score(reference, response)[kind].fmeasure)


def word_error_rate() -> Callable[[str, str], float]:
    """Edits / words of the reference, by jiwer; the number of edits where it is empty.
    It is a cost: as a reward, negate it.
    """
    wer = library("jiwer").wer
    return lambda response, reference: float(wer(reference, response))


def profanity() -> Callable[[str], float]:
    """Probability that a text is profane, by the linear model of alt-profanity-check,
    in [0, 1]. It is a cost: negate it.
    """
    predict = library("profanity_check").predict_prob
    return lambda text: float(predict([text])[0])


def library(name: str) -> Any:
    """A module of the extra `tasks`, imported when it is first asked for. Raises
    UserError when its package is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f'{name.split(".")[0]} is not installed; pip install -e ".[tasks]"'
        ) from error


def normalised(answer: str) -> str:
    """An answer as SQuAD compares it (https://arxiv.org/abs/1606.05250): lower case, no
    punctuation, no articles, single blanks.

    >>> normalised("The  U.S. Army!")
    'us army'
    """
    bare = "".join(letter for letter in answer.lower() if letter not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(response: str, reference: str) -> float:
    """1 where the normalised answers are the same, else 0."""
    return float(normalised(response) == normalised(reference))


def answer_f1(response: str, reference: str) -> float:
    """F1 of the words of the normalised answers; two that are empty agree, as in SQuAD
    2.

    >>> answer_f1("in the big city", "the city")  # in big city, city: 2 · 1 / (3 + 1)
    0.5
    """
    found, wanted = normalised(response).split(), normalised(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first place, place after the last) of each entity. An I- after another
    type, or after none, begins one, as in conlleval; a word that is neither B-... nor
    I-... is outside.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [('LOC', 3, 4), ('LOC', 4, 5), ('PER', 0, 2)]
    """
    found, kind, start = set(), None, 0
    for place, tag in enumerate([*tags, "O"]):
        own = tag[2:] if tag[:2] in ("B-", "I-") else None
        if kind is not None and (own != kind or tag[0] == "B"):
            found.add((kind, start, place))
            kind = None
        if kind is None and own is not None:
            kind, start = own, place
    return found


def repeated(text: str, n: int = 2) -> float:
    """Share of a text's n-grams of words that stand in it before (seq-rep-n of
    https://arxiv.org/abs/1908.04319); 0 without any.

    >>> repeated("so so so", 2)  # so so, so so: one of two
    0.5
    """
    words = text.split()
    return 1 - distinct([words], n) if len(words) >= n else 0.0


def against(judge: Callable[[str, str], float]) -> Callable[[str, str, str], float]:
    """fn(prompt, response, reference) for `on_host(..., references=True)`, of a judge
    of response and reference.
    """
    return lambda prompt, response, reference: judge(response, reference)
