"""The language tasks: how a prompt is put, what is rewarded and what is measured.

`sources.py` has where the examples come from, `task_rewards.py` the rewards,
`stages.py` trains and measures, and `experiments/<task>.py` chooses the sizes. A task
of your own is one more `Task`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxppo.config import RunConfig
from jaxppo.data.examples import Example
from jaxppo.errors import UserError
from jaxppo.models.shapes import ModelConfig, network
from jaxppo.pretrained.tiny import byte_tokenizer


@dataclass(frozen=True)
class TaskConfig(RunConfig):
    """A task's whole way: a model, its supervised baseline, and policy optimisation
    from there.
    """

    task: str = ""
    """name of a task (`jaxppo.tasks.TASKS`)"""
    data: str = ""
    """examples in place of the task's own: a file of {"prompt": ..., "reference": ...}
    a line (and what else the script's docstring names), or a hub data set id
    """
    model: str = ""
    """a checkpoint to start from (smollm2, a folder, a hub id); empty = a network made
    anew, of the sizes below
    """
    tokens: str = "bpe"
    """vocabulary of a new network: bpe (pairs of bytes) | words (in lower case) |
    bytes
    """
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
    """what is rewarded, by name (`jaxppo.task_rewards.REWARDS`); empty = as the task
    has it
    """
    test_rows: int = 500
    """most held-out examples that are measured: for validation, and before and after"""
    results: str = ""
    """folder that gets a copy of result.json as <task>/<name>.json; empty = none"""


def new_network(options: TaskConfig, vocab_size: int = 0, **context: int) -> ModelConfig:
    """The shape of a network made anew, and the context that it reads; without
    `vocab_size`, with the largest one allowed.
    """

    if not vocab_size:
        vocab_size = byte_tokenizer().vocab_size if options.tokens == "bytes" else options.max_vocab
    sizes = {"width": options.width, "num_layers": options.layers, "dropout": options.dropout}
    return network(options.model_kind, vocab_size=vocab_size, **sizes, **context)


class Task(NamedTuple):
    """One task. The first of `metrics` says which checkpoint is the best."""

    about: str
    source: str  # a name of `sources.SOURCES`
    reward: str  # a name of `task_rewards.REWARDS`
    metrics: tuple[str, ...]  # names of `evaluation.METRICS`
    # format of a prompt; an example's `extra` may be named in it, too
    prompt: str = "{prompt}"
    response: str = " {reference}"  # format of what the supervised stage teaches
    greedy: bool = True  # measured on the likeliest responses; else on samples
    seeded: bool = False  # the source makes other examples for another seed
    start: bool = False  # prompts begin with the token that starts a document


TASKS: dict[str, Task] = {
    "sentiment": Task(
        "reviews, continued positively",
        "openings",
        "vader",
        ("positivity", "distinct_2", "length"),
        response="{reference}",
        greedy=False,
        start=True,
    ),
    "sentiment_label": Task(
        "sentiment analysis by a policy that writes the label",
        "reviews",
        "exact",
        ("exact",),
        prompt="{prompt}\n=",
    ),
    "translation": Task(
        "German to English, short sentences",
        "translation",
        "bleu",
        ("bleu", "chrf", "length"),
        prompt="{prompt}\n=",
    ),
    "summarisation": Task(
        "what a paper is about, in a sentence",
        "summaries",
        "rouge_l",
        ("rougeL", "rouge1", "rouge2", "length"),
        prompt="{prompt}\nThe {aspect} in one sentence:",
    ),
    "question_answering": Task(
        "questions of a quiz, with short answers",
        "quiz",
        "token_f1",
        ("exact", "answer_f1"),
        prompt="{prompt}\nAnswer:",
    ),
    "choices": Task(
        "qualitative questions with two answers",
        "questions",
        "token_f1",
        ("exact", "answer_f1"),
        prompt="{prompt}\nAnswer:",
    ),
    "dialogue": Task(
        "the next turn of a play",
        "dialogue",
        "learned",
        ("distinct_2", "repetition", "length"),
        prompt="{prompt}\n=",
        greedy=False,
    ),
    "entities": Task(
        "named entities of a tweet and their kinds",
        "entities",
        "named_gain",
        ("named_f1",),
        prompt="{prompt}\nNames:",
    ),
    "spelling": Task(
        "a word spelt backwards",
        "reasoning:spell_backward",
        "exact",
        ("exact", "cer"),
        prompt="{prompt}\n=",
        response="{reference}",
    ),
    "sums": Task(
        "sums of two or three numbers",
        "reasoning:chain_sum",
        "exact",
        ("exact",),
        response="{reference}",
    ),
    "counting": Task(
        "how often a letter stands in some words",
        "reasoning:letter_counting",
        "exact",
        ("exact",),
        prompt="{prompt}\n=",
        response="{reference}",
    ),
    "speech": Task(
        "a recording's words; the policy reads log-mel features",
        "speech",
        "edit",
        ("wer", "cer"),
        prompt="=",
        response="{reference}",
    ),
}

LOWER = ("wer", "cer", "repetition")  # metrics of which less is better


def task_of(options: TaskConfig) -> Task:
    """The task that the options name."""
    if options.task not in TASKS:
        raise UserError(f"--task {options.task!r}: choose one of {', '.join(TASKS)}")
    return TASKS[options.task]


def as_one_of_many(
    name: str, task: Task, number: int, examples: "Sequence[Example]"
) -> "list[Example]":
    """A task's examples for a policy that has several: the prompt begins with the
    task's name, `extra["task"]` is its number.
    """

    answer = lambda x: task.response.format(reference=x.reference)
    return [Example(f"{name}: {put(task, x)}", answer(x), {"task": number}) for x in examples]


def one_of_many(task: Task) -> Task:
    """A task whose examples are already as `as_one_of_many` has made them."""
    return task._replace(prompt="{prompt}", response="{reference}")


def put(task: Task, example: Example) -> str:
    """An example as the task's prompt. Raises UserError for one without what the prompt
    names beside it.
    """
    try:
        return task.prompt.format(prompt=example.prompt, **words(example))
    except KeyError as missing:
        raise UserError(
            f'an example has no {missing}, which {task.prompt!r} names; give it beside "prompt"'
        ) from None


def mixed(
    groups: "Sequence[list[Example]]", weights: Sequence[float] = (), *, seed: int
) -> "list[Example]":
    """The examples of several tasks, shuffled; with weights each task has its share of
    as many as there are, repeated or cut.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    if weights and (len(weights) != len(groups) or min(weights) <= 0):
        raise UserError(
            f"--weights has {len(weights)} numbers for {len(groups)} tasks; give one share above 0 for each"
        )
    total = sum(len(group) for group in groups)
    wanted = (
        [round(total * w / sum(weights)) for w in weights]
        if weights
        else [len(group) for group in groups]
    )
    chosen = [group[i % len(group)] for group, n in zip(groups, wanted) for i in range(n)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def words(example: Example) -> dict[str, str]:
    """What of an example's `extra` may stand in a prompt."""
    return {name: x for name, x in example.extra.items() if isinstance(x, str)}
