"""The language tasks: a table of prompt formats, data, rewards and metrics.

`sources.py` loads the examples, `rewards.py` makes the rewards, `stages.py` trains and
measures, and `experiments/<task>.py` sets the sizes. Add a task as one more `Task`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from jaxppo.config import RunConfig
from jaxppo.data import prompts
from jaxppo.data.examples import Example
from jaxppo.errors import UserError
from jaxppo.models.shapes import ModelConfig, network
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.rewards import answers


@dataclass(frozen=True)
class TaskConfig(RunConfig):
    """Settings of a task: a model, its supervised baseline, and policy optimisation of
    the baseline.
    """

    RANGES: ClassVar = {
        **dict.fromkeys(
            ("max_vocab", "width", "layers", "sft_batch_size", "test_rows"), "(0, inf)"
        ),
        **dict.fromkeys(
            ("sft_steps", "sft_lr", "sft_eval_every", "sft_examples", "policy_examples"), "[0, inf)"
        ),
        "dropout": "[0, 1)",
    }

    task: str = ""
    """name of a task (`jaxppo.tasks.TASKS`)"""
    prompt_format: str = ""
    """format of prompts, such as "Q: {prompt}"; empty = the task's own"""
    data: str = ""
    """examples instead of the task's own: a hub data set id, or a file of
    {"prompt": ..., "reference": ...} per line (more fields: see the script's docstring)
    """
    model: str = ""
    """checkpoint to start from (smollm2, a folder, a hub id); empty = a new network of
    the sizes below
    """
    tokens: str = "bpe"
    """vocabulary of a new network: bpe (byte pairs) | words (lower case) | bytes"""
    max_vocab: int = 4000
    """largest size of a new vocabulary"""
    width: int = 128
    """width of a new network"""
    layers: int = 3
    """layers of a new network"""
    dropout: float = 0.1
    """dropout of a new network's embeddings and last hidden states in the supervised
    stage
    """
    sft_steps: int = 1000
    """most steps of the supervised stage; 0 = none: the policy starts from the model"""
    sft_batch_size: int = 64
    """examples per step of the supervised stage"""
    sft_examples: int = 0
    """examples of the supervised stage, from the first one; 0 = all"""
    policy_examples: int = 0
    """the same for the policy stage"""
    sft_lr: float = 2e-3
    """learning rate of the supervised stage"""
    sft_eval_every: int = 0
    """steps between validations of the supervised stage; 0 = a tenth of its steps"""
    reward: str = ""
    """name of the reward (`jaxppo.tasks.rewards.REWARDS`); empty = the task's own"""
    test_rows: int = 500
    """most examples in a validation, and in the test before and after"""
    results: str = ""
    """folder that gets a copy of result.json as <task>/<name>.json; empty = none"""


def new_network(options: TaskConfig, vocab_size: int = 0, **context: int) -> ModelConfig:
    """Return the shape of a new network. Without `vocab_size`: with the largest
    vocabulary allowed. `context`: sizes of a context that the network reads.
    """
    if not vocab_size:
        vocab_size = byte_tokenizer().vocab_size if options.tokens == "bytes" else options.max_vocab
    sizes = {"width": options.width, "num_layers": options.layers, "dropout": options.dropout}
    return network(options.model_kind, vocab_size=vocab_size, **sizes, **context)


class Task(NamedTuple):
    """A language task."""

    source: str  # name in `sources.SOURCES`
    reward: str  # name in `rewards.REWARDS`
    metrics: tuple[str, ...]  # names in `metrics.METRICS`; the first chooses the checkpoint
    prompt: str = "{prompt}"  # format of prompts; may use the text fields of `extra`
    response: str = " {reference}"  # format of the responses in supervised training
    greedy: bool = True  # measure greedy responses; False: samples alone
    start: bool = False  # prompts begin with the token that starts a document
    # what rewards and metrics compare with, from a reference; None = rewards see the
    # response of supervised training, cut to the length of a response, metrics the
    # reference
    expected: Callable[[str], str] | None = None


TASKS: dict[str, Task] = {
    "sentiment": Task(
        "openings",
        "vader",
        ("positivity", "distinct_2", "length"),
        response="{reference}",
        greedy=False,
        start=True,
    ),
    "sentiment_label": Task("reviews", "exact", ("exact",), prompt="{prompt}\n="),
    "translation": Task("translation", "bleu", ("bleu", "chrf", "length"), prompt="{prompt}\n="),
    "summarisation": Task(
        "summaries",
        "rouge_l",
        ("rougeL", "rouge1", "rouge2", "length"),
        prompt="{prompt}\nThe {aspect} in one sentence:",
    ),
    "question_answering": Task(
        "quiz", "token_f1", ("exact", "answer_f1"), prompt="{prompt}\nAnswer:"
    ),
    "choices": Task("questions", "token_f1", ("exact", "answer_f1"), prompt="{prompt}\nAnswer:"),
    "dialogue": Task(
        "dialogue",
        "learned",
        ("distinct_2", "repetition", "length"),
        prompt="{prompt}\n=",
        greedy=False,
    ),
    "entities": Task("entities", "named_gain", ("named_f1",), prompt="{prompt}\nNames:"),
    "spelling": Task(
        "reasoning:spell_backward",
        "exact",
        ("exact", "cer"),
        prompt="{prompt}\n=",
        response="{reference}",
    ),
    "letters": Task("letters", "exact", ("exact", "cer"), "{prompt}\n=", "{reference}"),
    "sums": Task("reasoning:chain_sum", "exact", ("exact",), response="{reference}"),
    "speech": Task("speech", "text_wer", ("wer", "cer"), prompt="=", response="{reference}"),
    "reverse_text": Task(
        "sentences",
        "reverse_text",
        ("reverse_text",),
        prompt="{prompt}\n=",
        response="<reversed_text>{reference}</reversed_text>",
        expected=str,
    ),
    "countdown": Task(
        "reasoning:countdown",
        "countdown",
        ("countdown_result", "countdown_format"),
        prompt="Use {prompt}\n=",
        expected=answers.countdown_puzzle,
    ),
    "gsm8k": Task(
        "reasoning:gsm_symbolic",
        "gsm8k",
        ("gsm8k_strict", "gsm8k_flexible"),
        prompt='{prompt} Let\'s think step by step and output the final answer after "####".',
        response="{reference}",
        expected=answers.gsm8k_number,
    ),
}

LOWER_IS_BETTER = ("wer", "cer", "repetition")  # metrics


def get_task(options: TaskConfig) -> Task:
    """Return the task that the options name, with their `prompt_format`, if they have
    one. Raises UserError for an unknown name.
    """
    if options.task not in TASKS:
        raise UserError(f"--task {options.task!r}: choose one of {', '.join(TASKS)}")
    task = TASKS[options.task]
    return task._replace(prompt=options.prompt_format or task.prompt)


def format_prompt(task: Task, example: Example) -> str:
    """Fill in the task's prompt format. Raises UserError for a missing field."""
    try:
        return prompts.fill(task.prompt, {**example.extra, "prompt": example.prompt})
    except KeyError as missing:
        raise UserError(
            f"an example has no {missing}, which the prompt format {task.prompt!r} needs;"
            ' add it next to "prompt"'
        ) from None


def multitask_examples(
    name: str, task: Task, number: int, examples: Sequence[Example]
) -> list[Example]:
    """Format one task's examples for a policy of several tasks: prompts begin with the
    task's name, and `extra["task"]` is its number.
    """
    prompt = lambda x: f"{name}: {format_prompt(task, x)}"
    answer = lambda x: task.response.format(reference=x.reference)
    return [Example(prompt(x), answer(x), {"task": number}) for x in examples]


def without_formats(task: Task) -> Task:
    """Return the task for examples that `multitask_examples` has formatted."""
    return task._replace(prompt="{prompt}", response="{reference}")


def mix_tasks(
    groups: Sequence[list[Example]], weights: Sequence[float] = (), *, seed: int
) -> list[Example]:
    """Shuffle the examples of several tasks together. Each task gets its share of their
    total number: its examples are repeated or cut. Without weights shares are equal.
    """
    weights = weights or [1.0] * len(groups)
    if len(weights) != len(groups) or min(weights) <= 0:
        raise UserError(
            f"--weights has {len(weights)} numbers for {len(groups)} tasks;"
            " give one number above 0 per task"
        )
    total = sum(len(group) for group in groups)
    shares = [total * w / sum(weights) for w in weights]
    chosen = [
        group[i % len(group)]
        for group, share in zip(groups, shares, strict=True)
        for i in range(round(share))
    ]
    return [chosen[i] for i in np.random.default_rng(seed).permutation(len(chosen))]
