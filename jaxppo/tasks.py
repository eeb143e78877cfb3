"""The language tasks: where the examples of each come from, how a prompt is put, what is rewarded and what is measured.

`stages.py` trains and measures them, `experiments/<task>.py` chooses the sizes. A task of your own is one more `Task`.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxppo.config import ModelConfig, RunConfig, UserError, network

if TYPE_CHECKING:
    from jaxppo.assemble import Policy
    from jaxppo.data.examples import Example, Examples
    from jaxppo.pretrained.tokenizer import Tokenizer
    from jaxppo.types import RewardFn


@dataclass(frozen=True)
class TaskConfig(RunConfig):
    """A task's whole way: a model, its supervised baseline, and policy optimisation from there."""

    task: str = ""
    """name of a task (`jaxppo.tasks.TASKS`)"""
    data: str = ""
    """examples in place of the task's own: a file of {"prompt": ..., "reference": ...} a line, or a hub data set id"""
    model: str = ""
    """a checkpoint to start from (smollm2, a folder, a hub id); empty = a network made anew, of the sizes below"""
    tokens: str = "bpe"
    """vocabulary of a new network: bpe (pairs of bytes) | words (in lower case) | bytes"""
    max_vocab: int = 4000
    """most tokens of a new vocabulary"""
    width: int = 128
    """of a new network's hidden states"""
    layers: int = 3
    """of a new network"""
    dropout: float = 0.1
    """of a new network's embeddings and last hidden states, in the supervised stage"""
    sft_steps: int = 1000
    """most steps of the supervised stage"""
    sft_batch_size: int = 64
    """examples in a step of the supervised stage"""
    sft_lr: float = 2e-3
    """learning rate of the supervised stage"""
    sft_eval_every: int = 0
    """steps between validations of the supervised stage; 0 = a tenth of its steps"""
    reward: str = ""
    """what is rewarded, by name (`jaxppo.tasks.REWARDS`); empty = as the task has it"""
    test_rows: int = 500
    """most held-out examples that are measured: for validation, and before and after"""
    results: str = ""
    """folder that gets a copy of result.json as <task>/<name>.json; empty = none"""


def new_network(options: TaskConfig, vocab_size: int = 0, **context: int) -> ModelConfig:
    """The shape of a network made anew, and the context that it reads; without `vocab_size`, with the largest one allowed."""
    return network(
        options.model_kind, vocab_size=vocab_size or (257 if options.tokens == "bytes" else options.max_vocab),
        width=options.width, num_layers=options.layers, dropout=options.dropout, **context,
    )  # fmt: skip


class Task(NamedTuple):
    """One task. The first of `metrics` says which checkpoint is the best."""

    about: str
    source: str  # what `load_examples` asks for
    reward: str  # a name of REWARDS
    metrics: tuple[str, ...]  # names of `evaluation.METRICS`
    prompt: str = "{prompt}"  # format of a prompt; an example's `extra` may be named in it, too
    response: str = " {reference}"  # format of what the supervised stage teaches
    greedy: bool = True  # measured on the likeliest responses; else on samples
    seeded: bool = False  # the source makes other examples for another seed
    start: bool = False  # prompts begin with the token that starts a document


TASKS: dict[str, Task] = {
    "sentiment": Task(
        "reviews, continued positively", "openings", "vader", ("positivity", "distinct_2", "length"), response="{reference}",
        greedy=False, start=True,
    ),
    "sentiment_label": Task(
        "sentiment analysis by a policy that writes the label", "reviews", "exact", ("exact",), prompt="{prompt}\n=",
    ),
    "translation": Task(
        "German to English, short sentences", "translation", "bleu", ("bleu", "chrf", "length"), prompt="{prompt}\n=",
    ),
    "summarisation": Task(
        "what a paper is about, in a sentence", "summaries", "rouge_l", ("rougeL", "rouge1", "rouge2", "length"),
        prompt="{prompt}\nThe {aspect} in one sentence:",
    ),
    "question_answering": Task(
        "questions of a quiz, with short answers", "quiz", "token_f1", ("exact", "answer_f1"), prompt="{prompt}\nAnswer:",
    ),
    "choices": Task(
        "qualitative questions with two answers", "questions", "token_f1", ("exact", "answer_f1"), prompt="{prompt}\nAnswer:",
    ),
    "dialogue": Task(
        "the next turn of a play", "dialogue", "learned", ("distinct_2", "repetition", "length"), prompt="{prompt}\n=",
        greedy=False,
    ),
    "entities": Task(
        "named entities of a tweet and their kinds", "entities", "named_gain", ("named_f1",), prompt="{prompt}\nNames:",
    ),
    "spelling": Task(
        "a word spelt backwards", "reasoning:spell_backward", "exact", ("exact", "cer"), prompt="{prompt}\n=",
        response="{reference}",
    ),
    "sums": Task("sums of two or three numbers", "reasoning:chain_sum", "exact", ("exact",), response="{reference}"),
    "counting": Task(
        "how often a letter stands in some words", "reasoning:letter_counting", "exact", ("exact",), prompt="{prompt}\n=",
        response="{reference}",
    ),
    "speech": Task(
        "a recording's words; the policy reads log-mel features", "speech", "edit", ("wer", "cer"), prompt="=",
        response="{reference}",
    ),
}  # fmt: skip

Source = Callable[[TaskConfig, "Tokenizer | None"], "Examples"]


def _module(name: str) -> Source:
    def load(options: TaskConfig, tokenizer: "Tokenizer | None"):
        import importlib

        return importlib.import_module(f"jaxppo.data.{name}").load()

    return load


def _reviews(options: TaskConfig, tokenizer: "Tokenizer | None"):
    """Sentences that people rated beyond ±.5, each with its side in a word."""
    from jaxppo.data import examples, sentiment

    reviews = sentiment.load()
    clear = [(text, rating) for text, rating in zip(reviews.texts, reviews.ratings) if abs(rating) > 0.5]
    return examples.split([examples.Example(text, "good" if rating > 0 else "bad") for text, rating in clear])


def _openings(options: TaskConfig, tokenizer: "Tokenizer | None"):
    """The first tokens of a review and its rest, in the main job's own split: its test prompts are none that it learned from."""
    from jaxppo.data import examples, sentiment

    if tokenizer is None:
        raise UserError("the task sentiment is cut into tokens by a run's own tokenizer: experiments/sentiment.py trains it")

    def put(text: str) -> examples.Example:
        ids = tokenizer.encode(text)
        return examples.Example(tokenizer.decode(ids[: sentiment.OPENING]), tokenizer.decode(ids[sentiment.OPENING :]))

    texts = sentiment.load().texts
    return examples.Examples(*([put(texts[i]) for i in part] for part in sentiment.split_by_opening(texts, tokenizer.encode)))


def _translation(options: TaskConfig, tokenizer: "Tokenizer | None"):
    """Sentences of at most eight words on both sides: a small network learns those first."""
    from jaxppo.data import translation

    short = lambda x: max(len(x.prompt.split()), len(x.reference.split())) <= 8
    return type(found := translation.load())(*([x for x in part if short(x)] for part in found))


def _entities(options: TaskConfig, tokenizer: "Tokenizer | None"):
    """The entities of a tweet written out: to a small model a row of tags is first of all a matter of counting words. Three of
    five tweets have none: to train on there are as many without as with."""
    from jaxppo.data import entities, examples

    put = lambda x: examples.Example(x.prompt, entities.named(x.extra["words"], x.extra["tags"]))
    train, *others = ([put(x) for x in part] for part in entities.load())
    spare = iter(range(sum(x.reference != "none" for x in train)))
    return examples.Examples([x for x in train if x.reference != "none" or next(spare, None) is not None], *others)


def _summaries(options: TaskConfig, tokenizer: "Tokenizer | None"):
    """At most 80 words of each abstract, in whole sentences: the first ones, or the last where the outcome is asked for."""
    from jaxppo.data import summaries

    cut = lambda x: x._replace(prompt=some_sentences(x.prompt, 80, last=x.extra["aspect"] == "outcome"))
    return type(found := summaries.load())(*([cut(x) for x in part] for part in found))


def some_sentences(text: str, words: int, *, last: bool = False) -> str:
    """As many of a text's first (or last) sentences as have so many words together; one at least.

    >>> some_sentences("One is short. This one has five words. Last one.", 8), some_sentences("A b. C d e.", 3, last=True)
    ('One is short. This one has five words.', 'C d e.')
    """
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    order = range(len(sentences) - 1, -1, -1) if last else range(len(sentences))
    counts = list(itertools.accumulate(len(sentences[i].split()) for i in order))
    number = max(1, sum(count <= words for count in counts))
    return " ".join(sentences[-number:] if last else sentences[:number])


def _reasoning(options: TaskConfig, tokenizer: "Tokenizer | None"):
    from jaxppo.data import reasoning

    return reasoning.load(task_of(options).source.partition(":")[2], size=200 if options.tiny else 20_000)


def _speech(options: TaskConfig, tokenizer: "Tokenizer | None"):
    """Recordings as `context`: features of a fixed number of frames, and how many of them are real."""
    from jaxppo.data import examples, speech

    def heard(part):
        features, lengths = speech.stacked(part, FRAMES)
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


def load_examples(options: TaskConfig, tokenizer: "Tokenizer | None" = None) -> "Examples":
    """The examples of a task, or those of `options.data`; some are cut by a policy's tokenizer. Raises UserError for a task or
    a file that is not there."""
    from jaxppo.data import examples

    source = SOURCES[task_of(options).source.partition(":")[0]]
    found = examples.load(options.data) if options.data else source(options, tokenizer)
    if options.tiny:
        found = type(found)(found.train[:64], found.validation[:8], found.test[:8])
    return found


def task_of(options: TaskConfig) -> Task:
    """The task that the options name."""
    if options.task not in TASKS:
        raise UserError(f"--task {options.task!r}: choose one of {', '.join(TASKS)}")
    return TASKS[options.task]


def as_one_of_many(name: str, task: Task, number: int, examples: "Sequence[Example]") -> "list[Example]":
    """A task's examples for a policy that has several: the prompt begins with the task's name, `extra["task"]` is its number."""
    from jaxppo.data.examples import Example

    put = lambda x: task.prompt.format(prompt=x.prompt, **words(x))
    return [Example(f"{name}: {put(x)}", task.response.format(reference=x.reference), {"task": number}) for x in examples]


def mixed(groups: "Sequence[list[Example]]", weights: Sequence[float] = (), *, seed: int) -> "list[Example]":
    """The examples of several tasks, shuffled; with weights each task has its share of as many as there are, repeated or cut."""
    import numpy as np

    rng = np.random.default_rng(seed)
    if weights and (len(weights) != len(groups) or min(weights) < 0 or sum(weights) <= 0):
        raise UserError(f"--weights has {len(weights)} numbers for {len(groups)} tasks; give one share for each")
    total = sum(len(group) for group in groups)
    wanted = [round(total * w / sum(weights)) for w in weights] if weights else [len(group) for group in groups]
    chosen = [group[i % len(group)] for group, n in zip(groups, wanted) for i in range(n)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def words(example: "Example") -> dict[str, str]:
    """What of an example's `extra` may stand in a prompt."""
    return {name: x for name, x in example.extra.items() if isinstance(x, str)}


class Reward(NamedTuple):
    """A reward and the parameters that it is called with."""

    fn: "RewardFn"
    params: Any = None


def _on_tokens(name: str) -> Callable[[TaskConfig, "Policy"], Reward]:
    """A metric of `rewards.metrics` on token ids, in the program."""

    def make(options: TaskConfig, policy: "Policy") -> Reward:
        from jaxppo.rewards import metrics

        table: dict[str, metrics.Metric] = {
            "bleu": metrics.bleu,
            "rouge_l": metrics.rouge_l,
            "token_f1": metrics.token_f1,
            "exact": metrics.exact_match,
            "edit": lambda found, wanted: -metrics.error_rate(found, wanted),
        }
        return Reward(metrics.reward(table[name], eos=policy.tokenizer.eos_id), {})

    return make


def _on_text(judge: Callable[[], Callable[[str, str], float]]) -> Callable[[TaskConfig, "Policy"], Reward]:
    """A judge of decoded response and reference, on the host; space around them does not count."""

    def make(options: TaskConfig, policy: "Policy") -> Reward:
        from jaxppo.rewards import on_host

        score = judge()
        call = lambda prompt, response, reference: score(response.strip(), reference.strip())
        return Reward(on_host(call, policy.tokenizer.decode_batch, references=True), {})

    return make


def _text(name: str, *options: str, sign: float = 1.0) -> Callable[[], Callable[[str, str], float]]:
    """The judge of that name in `rewards.text`."""

    def make():
        from jaxppo.rewards import text

        judge = getattr(text, name)(*options)
        return lambda response, reference: sign * judge(response, reference)

    return make


def _of_counts(name: str, score: Callable[[float, float], float]) -> Callable[[], Callable[[str, str], float]]:
    """A score of a row's counts by the metric of that name: (2 · common, found + wanted)."""

    def make():
        from jaxppo import evaluation

        rows = evaluation.METRICS[name].rows
        return lambda response, reference: float(score(*rows(response, reference)))

    return make


def _f1(common: float, both: float) -> float:
    """A row's own F1; 1 where neither has an entity."""
    return common / both if both else 1.0


def _gain(reached: float) -> Callable[[float, float], float]:
    """A row's part in raising the F1 of all rows above the one reached: 2 · common - reached · (found + wanted).

    The row's own F1 says something else: where there is no entity, it rewards silence with all there is. With this one, naming
    an entity pays when it is right with a probability above reached / 2, which is when it raises the F1 of all rows (Lipton et
    al. 2014, https://arxiv.org/abs/1402.1892).
    """
    return lambda common, both: common - reached * both


def _vader() -> Callable[[str, str], float]:
    """VADER's sentiment of the response alone."""
    from jaxppo.rewards import text

    judge = text.vader()
    return lambda response, reference: judge(response)


REWARDS: dict[str, Callable[[TaskConfig, "Policy"], Reward]] = {
    **{name: _on_tokens(name) for name in ("bleu", "rouge_l", "token_f1", "exact", "edit")},
    "text_bleu": _on_text(_text("sentence_bleu")),
    "text_chrf": _on_text(_text("chrf")),
    "text_rouge_l": _on_text(_text("rouge", "rougeL")),
    "text_wer": _on_text(_text("word_error_rate", sign=-1.0)),
    "vader": _on_text(_vader),
    "entity_f1": _on_text(_of_counts("entity_f1", _f1)),
    "named_f1": _on_text(_of_counts("named_f1", _f1)),
    "named_gain": _on_text(_of_counts("named_f1", _gain(0.3))),  # about what a small model reaches
}
LOWER = ("wer", "cer", "repetition")  # metrics of which less is better


def make_reward(options: TaskConfig, policy: "Policy") -> Reward:
    """The reward that the options name, or the task's own. Raises UserError for a name that is not in the table."""
    name = options.reward or task_of(options).reward
    if name not in REWARDS:
        raise UserError(f"--reward {name!r}: choose one of {', '.join(REWARDS)}")
    return REWARDS[name](options, policy)
