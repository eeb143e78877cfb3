"""The examples of each task. Add your own source as a function in SOURCES, or pass a
file (`--data`).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxppo.data import examples, sentiment
from jaxppo.data.examples import Example, Examples, HubColumns, split_examples
from jaxppo.errors import UserError
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.tasks import TaskConfig, get_task
from jaxppo.tasks.datasets import (
    dialogue,
    entities,
    questions,
    quiz,
    reasoning,
    speech,
    summaries,
    translation,
)

FRAMES = 125  # of a recording, 40 ms each: longer ones are left out
PAIRS = 800  # of recordings in the training part, beside the single ones
MAX_WORDS = 80  # of an abstract
LETTERS = 8  # of the longest word to spell with spaces
MAX_LETTERS = 30  # of a sentence to write backward
PUZZLES = {"countdown": 5_000}  # their generator takes a minute
MOST_PUZZLES = 20_000


def _reviews() -> Examples:
    """Sentences rated beyond ±.5, labelled good or bad."""
    reviews = sentiment.load_reviews()
    rated = zip(reviews.texts, reviews.ratings, strict=True)
    label = lambda rating: "good" if rating > 0 else "bad"
    return split_examples([Example(text, label(x)) for text, x in rated if abs(x) > 0.5])


def _openings(tokenizer: Tokenizer | None) -> Examples:
    """The first tokens of a review and the rest, with the split of the main experiment:
    it was not trained on the test prompts.
    """
    if tokenizer is None:
        raise UserError(
            "the task sentiment needs the tokenizer of a run: train with experiments/sentiment.py"
        )

    def cut(text: str) -> Example:
        ids, opening = tokenizer.encode(text), sentiment.OPENING_TOKENS
        return Example(tokenizer.decode(ids[:opening]), tokenizer.decode(ids[opening:]))

    texts = sentiment.load_reviews().texts
    parts = sentiment.split_by_opening(texts, tokenizer.encode)
    return Examples(*([cut(texts[i]) for i in part] for part in parts))


def _translation() -> Examples:
    """Sentences of at most eight words on both sides, for a small network. In the
    training part there are phrases, too, after the sentences.
    """
    short = lambda x: max(len(x.prompt.split()), len(x.reference.split())) <= 8
    train, *held_out = ([x for x in part if short(x)] for part in translation.load())
    return Examples([*train, *translation.load_phrases()], *held_out)


def _entities() -> Examples:
    """The entities of a tweet as text: with tags, small models fail at counting words.
    Three of five tweets have no entity; the training part keeps as many as have some.
    """
    describe = lambda x: entities.describe_entities(x.extra["words"], x.extra["tags"])
    parts = [[Example(x.prompt, describe(x)) for x in part] for part in entities.load()]
    empty = itertools.count(1)
    some = sum(x.reference != "none" for x in parts[0])
    parts[0] = [x for x in parts[0] if x.reference != "none" or next(empty) <= some]
    return Examples(*parts)


def _summaries() -> Examples:
    """At most 80 words of each abstract in whole sentences: the last ones for the
    outcome, else the first.
    """
    last = lambda x: x.extra["aspect"] == "outcome"
    cut = lambda x: x._replace(prompt=limit_sentences(x.prompt, MAX_WORDS, last=last(x)))
    return Examples(*([cut(x) for x in part] for part in summaries.load()))


def limit_sentences(text: str, words: int, *, last: bool = False) -> str:
    """Keep the first (or last) sentences of a text, up to so many words, at least one.

    >>> limit_sentences("One is short. This one has five words. Last one.", 8)
    'One is short. This one has five words.'
    >>> limit_sentences("A b. C d e.", 3, last=True)
    'C d e.'
    """
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    counts = [len(sentence.split()) for sentence in sentences]
    totals = itertools.accumulate(reversed(counts) if last else counts)
    number = max(1, sum(total <= words for total in totals))
    return " ".join(sentences[-number:] if last else sentences[:number])


def _speech() -> Examples:
    """Recordings as `context` (features of FRAMES frames) and `context_length`. In the
    training part there are joined pairs, too.
    """

    def with_context(part: list[Example]) -> list[Example]:
        extra = zip(*speech.stack_features(part, FRAMES, 2), strict=True)
        return [
            x._replace(extra={"context": features, "context_length": length})
            for x, (features, length) in zip(part, extra, strict=True)
        ]

    found = speech.load()
    pairs = speech.join_pairs(found.train, PAIRS, frames=2 * FRAMES)
    parts = found._replace(train=[*found.train, *pairs])
    return Examples(*(with_context(part) for part in parts))


def puzzles(options: TaskConfig, **settings: int) -> Examples:
    """Puzzles of the task's kind, few at smoke size. `settings`: of their generator."""
    kind = get_task(options).source.partition(":")[2]
    size = PUZZLES.get(kind, MOST_PUZZLES)
    return reasoning.load(kind, size=200 if options.tiny else size, **settings)


def _letters(options: TaskConfig) -> Examples:
    """Words of up to LETTERS letters to spell backward, with spaces between letters."""
    words = puzzles(dataclasses.replace(options, task="spelling"))
    short = [[x.reference for x in part if len(x.reference) <= LETTERS] for part in words]
    spaced = lambda backward: Example(" ".join(backward[::-1]), " ".join(backward))
    return Examples(*([spaced(x) for x in part] for part in short))


def _sentences() -> Examples:
    """Short sentences of Shakespeare's plays, and their letters backward."""
    turns = sorted({x.reference for part in dialogue.load() for x in part})
    found = [y for x in turns for y in re.split(r"(?<=[.!?;:])\s+", x)]
    short = dict.fromkeys(x for x in found if " " in x and len(x) <= MAX_LETTERS)
    return split_examples([Example(x, x[::-1]) for x in short])


def _countdown(row: Mapping[str, Any]) -> Example:
    """A puzzle without a solution."""
    puzzle = f"{' '.join(map(str, row['nums']))} -> {row['target']}"
    return Example(puzzle, puzzle, {"numbers": str(row["nums"]), "target": str(row["target"])})


# What is known of data sets on a hub: their columns, and their parts.
HUB: dict[str, HubColumns] = {
    "PrimeIntellect/Reverse-Text-RL": HubColumns(
        lambda row: Example(row["prompt"], row["prompt"][::-1])
    ),
    "Jiayi-Pan/Countdown-Tasks-3to4": HubColumns(_countdown),
    "openai/gsm8k": HubColumns(
        lambda row: Example(row["question"], row["answer"]), configuration="main", test="test"
    ),
}


SOURCES: dict[str, Callable[[TaskConfig, Tokenizer | None], Examples]] = {
    "openings": lambda options, tokenizer: _openings(tokenizer),
    "reviews": lambda *_: _reviews(),
    "reasoning": lambda options, _: puzzles(options),
    "letters": lambda options, _: _letters(options),
    "sentences": lambda *_: _sentences(),
    "speech": lambda *_: _speech(),
    "translation": lambda *_: _translation(),
    "entities": lambda *_: _entities(),
    "summaries": lambda *_: _summaries(),
    "quiz": lambda *_: quiz.load(),
    "questions": lambda *_: questions.load(),
    "dialogue": lambda *_: dialogue.load(),
}


def load_examples(options: TaskConfig, tokenizer: Tokenizer | None = None) -> Examples:
    """Load the examples of a task, or of `options.data`. Raises UserError for an
    unknown task, a missing file, and a part without examples.
    """
    source = SOURCES[get_task(options).source.partition(":")[0]]
    data = options.data
    found = examples.load(data, HUB.get(data)) if data else source(options, tokenizer)
    if not all(found):
        names = ("training", "validation", "test")
        sizes = ", ".join(f"{len(part)} {name}" for name, part in zip(names, found, strict=True))
        raise UserError(
            f"--data {options.data}: the split by prompt gives {sizes} examples; each part needs"
            " some, so give more"
        )
    if options.tiny:
        return Examples(found.train[:64], found.validation[:8], found.test[:8])
    return found
