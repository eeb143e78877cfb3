"""Where the examples of each task come from. A source of your own is one more function
in SOURCES, or a file (`--data`).
"""

import itertools
import re
from collections.abc import Callable

from jaxppo.data import examples, sentiment
from jaxppo.data.examples import Examples
from jaxppo.errors import UserError
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.tasks import TaskConfig, get_task
from jaxppo.tasks.datasets import entities, reasoning, speech, summaries, translation

Source = Callable[[TaskConfig, Tokenizer | None], Examples]


def _module(name: str) -> Source:
    def load(options: TaskConfig, tokenizer: Tokenizer | None):
        import importlib

        return importlib.import_module(f"jaxppo.tasks.datasets.{name}").load()

    return load


def _reviews(options: TaskConfig, tokenizer: Tokenizer | None):
    """Sentences that people rated beyond ±.5, each with its side in a word."""

    reviews = sentiment.load_reviews()
    clear = [
        (text, rating) for text, rating in zip(reviews.texts, reviews.ratings) if abs(rating) > 0.5
    ]
    return examples.split_examples(
        [examples.Example(text, "good" if rating > 0 else "bad") for text, rating in clear]
    )


def _openings(options: TaskConfig, tokenizer: Tokenizer | None):
    """The first tokens of a review and its rest, in the main job's own split: its test
    prompts are none that it learned from.
    """

    if tokenizer is None:
        raise UserError(
            "the task sentiment is cut into tokens by a run's own tokenizer: experiments/sentiment.py trains it"
        )

    def put(text: str) -> examples.Example:
        ids = tokenizer.encode(text)
        return examples.Example(
            tokenizer.decode(ids[: sentiment.OPENING_TOKENS]),
            tokenizer.decode(ids[sentiment.OPENING_TOKENS :]),
        )

    texts = sentiment.load_reviews().texts
    return examples.Examples(
        *(
            [put(texts[i]) for i in part]
            for part in sentiment.split_by_opening(texts, tokenizer.encode)
        )
    )


def _translation(options: TaskConfig, tokenizer: Tokenizer | None):
    """Sentences of at most eight words on both sides: a small network learns those
    first.
    """

    short = lambda x: max(len(x.prompt.split()), len(x.reference.split())) <= 8
    return type(found := translation.load())(*([x for x in part if short(x)] for part in found))


def _entities(options: TaskConfig, tokenizer: Tokenizer | None):
    """The entities of a tweet written out: to a small model a row of tags is first of
    all a matter of counting words. Three of five tweets have none: to train on there
    are as many without as with.
    """

    put = lambda x: examples.Example(
        x.prompt, entities.describe_entities(x.extra["words"], x.extra["tags"])
    )
    train, *others = ([put(x) for x in part] for part in entities.load())
    spare = iter(range(sum(x.reference != "none" for x in train)))
    return examples.Examples(
        [x for x in train if x.reference != "none" or next(spare, None) is not None], *others
    )


def _summaries(options: TaskConfig, tokenizer: Tokenizer | None):
    """At most 80 words of each abstract, in whole sentences: the first ones, or the
    last where the outcome is asked for.
    """

    cut = lambda x: x._replace(
        prompt=limit_sentences(x.prompt, 80, last=x.extra["aspect"] == "outcome")
    )
    return type(found := summaries.load())(*([cut(x) for x in part] for part in found))


def limit_sentences(text: str, words: int, *, last: bool = False) -> str:
    """As many of a text's first (or last) sentences as have so many words together; one
    at least.

    >>> (
    ...     some_sentences("One is short. This one has five words. Last one.", 8),
    ...     some_sentences("A b. C d e.", 3, last=True),
    ... )
    ('One is short. This one has five words.', 'C d e.')
    """
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    order = range(len(sentences) - 1, -1, -1) if last else range(len(sentences))
    counts = list(itertools.accumulate(len(sentences[i].split()) for i in order))
    number = max(1, sum(count <= words for count in counts))
    return " ".join(sentences[-number:] if last else sentences[:number])


def _reasoning(options: TaskConfig, tokenizer: Tokenizer | None):

    return reasoning.load(
        get_task(options).source.partition(":")[2], size=200 if options.tiny else 20_000
    )


def _speech(options: TaskConfig, tokenizer: Tokenizer | None):
    """Recordings as `context`: features of a fixed number of frames, and how many of
    them are real.
    """

    def heard(part):
        features, lengths = speech.stack_features(part, FRAMES)
        return [
            examples.Example(x.prompt, x.reference, {"context": f, "context_length": n})
            for x, f, n in zip(part, features, lengths)
        ]

    return examples.Examples(*(heard(part) for part in speech.load()))


FRAMES = 500  # hundredths of a second: longer recordings are left out

SOURCES: dict[str, Source] = {
    "openings": _openings,
    "reviews": _reviews,
    "reasoning": _reasoning,
    "speech": _speech,
    "translation": _translation,
    "entities": _entities,
    "summaries": _summaries,
    **{name: _module(name) for name in ("quiz", "questions", "dialogue")},
}


def load_examples(options: TaskConfig, tokenizer: Tokenizer | None = None) -> Examples:
    """The examples of a task, or those of `options.data`; some are cut by a policy's
    tokenizer. Raises UserError for a task or a file that is not there.
    """

    source = SOURCES[get_task(options).source.partition(":")[0]]
    found = examples.load(options.data) if options.data else source(options, tokenizer)
    if not all(found):
        sizes = ", ".join(
            f"{len(part)} {name}"
            for name, part in zip(("training", "validation", "test"), found, strict=True)
        )
        raise UserError(
            f"--data {options.data}: the split by prompt gives {sizes} examples, and each part needs some; give more"
        )
    if options.tiny:
        found = type(found)(found.train[:64], found.validation[:8], found.test[:8])
    return found
