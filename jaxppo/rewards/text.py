"""Judges and metrics of decoded text, on the host.

A judge scores a response, or a response and its reference. A judge that needs a package
is made by a function that imports it.
"""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from jaxppo.errors import UserError

PUNCTUATION = frozenset(string.punctuation)  # ASCII only, as in SQuAD's script


def import_extra(name: str, extra: str = "tasks") -> Any:
    """Import a module of an optional extra. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f'{package} is not installed; pip install -e ".[{extra}]"') from error


def vader() -> Callable[[str], float]:
    """VADER's compound sentiment of a text, in [-1, 1]: a lexicon with rules, untrained
    (Hutto & Gilbert 2014, https://ojs.aaai.org/index.php/ICWSM/article/view/14550).
    """
    module = import_extra("vaderSentiment.vaderSentiment", "demo")
    analyzer = module.SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def profanity() -> Callable[[str], float]:
    """Probability that a text is profane, by alt-profanity-check. It is a cost."""
    predict = import_extra("profanity_check").predict_prob
    return lambda text: float(predict([text])[0])


def sentence_bleu() -> Callable[[str, str], float]:
    """sacrebleu's BLEU of a response against its reference, in [0, 1]: tokenizer 13a,
    smoothing "exp", effective order.
    """
    bleu = import_extra("sacrebleu").BLEU(effective_order=True)
    return lambda response, reference: bleu.sentence_score(response, [reference]).score / 100


def chrf() -> Callable[[str, str], float]:
    """sacrebleu's chrF2 in [0, 1]: F of character n-grams up to 6 (Popović 2015,
    https://aclanthology.org/W15-3049).
    """
    metric = import_extra("sacrebleu").CHRF()
    return lambda response, reference: metric.sentence_score(response, [reference]).score / 100


def rouge(kind: str) -> Callable[[str, str], float]:
    """rouge-score's F-measure of rouge1, rouge2 or rougeL in [0, 1], without stemmer;
    words consist of a-z and 0-9.
    """
    scorer = import_extra("rouge_score.rouge_scorer").RougeScorer([kind])
    return lambda response, reference: float(scorer.score(reference, response)[kind].fmeasure)


def word_error_rate() -> Callable[[str, str], float]:
    """jiwer's edits / words of the reference; the number of edits where it is empty. It
    is a cost.
    """
    wer = import_extra("jiwer").wer
    return lambda response, reference: float(wer(reference, response))


def distinct(rows: Sequence[Sequence[Hashable]], n: int, *, tokens: int | None = None) -> float:
    """Distinct n-grams / n-grams of all rows (Li et al. 2016,
    https://arxiv.org/abs/1510.03055); n-grams do not cross rows.

    It falls with the amount of text, so compare equal amounts: `tokens` keeps that many
    tokens in all, from the first row on.

    >>> distinct([[1, 2, 1, 2], [1, 2]], 2)  # 12, 21, 12, 12: two of four
    0.5
    """
    grams, used = [], 0
    for row in rows:
        row = list(row) if tokens is None else list(row)[: max(tokens - used, 0)]
        used += len(row)
        grams += [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_share(text: str, n: int = 2) -> float:
    """Share of a text's n-grams of words that occur earlier in it (seq-rep-n of
    https://arxiv.org/abs/1908.04319); 0 without n-grams.

    >>> repeated_share("so so so", 2)  # so so, so so: one of two
    0.5
    """
    words = text.split()
    return 1 - distinct([words], n) if len(words) >= n else 0.0


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean.

    >>> standard_error([1.0, 2.0, 3.0])  # std 1, over sqrt 3
    0.577...
    """
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def normalise_answer(answer: str) -> str:
    """Normalise an answer like SQuAD (https://arxiv.org/abs/1606.05250): lower case, no
    punctuation, no articles, single spaces.

    >>> normalise_answer("The  U.S. Army!")
    'us army'
    """
    bare = "".join(letter for letter in answer.lower() if letter not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(response: str, reference: str) -> float:
    """1 if the normalised answers are equal, else 0."""
    return float(normalise_answer(response) == normalise_answer(reference))


def answer_f1(response: str, reference: str) -> float:
    """F1 of the words of the normalised answers; 1 if both are empty, as in SQuAD 2.

    >>> answer_f1("in the big city", "the city")  # in big city, city: 2 · 1 / (3 + 1)
    0.5
    """
    found, wanted = normalise_answer(response).split(), normalise_answer(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity in BIO tags. An I- without
    a beginning begins one, as in conlleval; any other word is O.

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
