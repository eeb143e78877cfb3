"""What a policy does on a task's held-out examples: responses, metrics, intervals."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxppo import ppo, tasks
from jaxppo.data import prompts
from jaxppo.data.examples import Example
from jaxppo.data.prompts import PromptSet
from jaxppo.errors import UserError
from jaxppo.run import files, load, sampler
from jaxppo.run.load import Policy
from jaxppo.run.sampler import Sample
from jaxppo.tasks import Task, TaskConfig, metrics, sources
from jaxppo.types import TrainState

ExtraMetrics = Callable[
    [list[Sample]], dict[str, float]
]  # numbers beside the task's metrics, from samples alone


class FormattedExamples(NamedTuple):
    """Examples as a task puts them."""

    prompts: list[str]
    responses: list[str]
    references: list[str]
    extra: dict[str, np.ndarray]  # [N ...] each: features of recordings


def format_examples(task: Task, examples: Sequence[Example]) -> FormattedExamples:
    """Prompts and responses in the task's formats. Raises UserError for an example that
    lacks what the task needs of it.
    """
    prompts = [tasks.format_prompt(task, x) for x in examples]
    if task.source == "speech" and "context" not in examples[0].extra:
        raise UserError(
            'recordings need "context" (frames of log-mel features) and "context_length" beside prompt and reference'
        )
    responses = [task.response.format(reference=x.reference) for x in examples]
    kinds = {
        "context": np.float32,
        "context_length": np.int32,
        "task": np.int32,
    }  # what the program may read
    known = [name for name in kinds if not isinstance(examples[0].extra.get(name, ""), str)]
    arrays = {
        name: np.stack([np.asarray(x.extra[name], kinds[name]) for x in examples]) for name in known
    }
    return FormattedExamples(prompts, responses, [x.reference for x in examples], arrays)


def encode_examples(
    config: TaskConfig, policy: Policy, task: Task, examples: Sequence[Example]
) -> tuple[PromptSet, list[str]]:
    """(encoded prompts, with the ids of their references; the references as text). A
    prompt that is too long loses its beginning, and the ids of a reference their end; a
    line says how many.
    """
    own, most = format_examples(task, examples), config.response_length
    whole = [policy.tokenizer.encode(text) for text in own.responses]
    ids = [reference[:most] for reference in whole]
    padded = np.zeros((len(ids), config.response_length), np.int32)
    for row, reference in enumerate(ids):
        padded[row, : len(reference)] = reference
    lengths = np.asarray([len(reference) for reference in ids], np.int32)
    extra = {"reference": padded, "reference_length": lengths, **own.extra}
    start = policy.tokenizer.start_id if config.prompt_start or task.start else None
    encoded = prompts.encode(
        own.prompts,
        policy.tokenizer,
        config.prompt_length,
        too_long="last",
        extra=extra,
        start=start,
    )
    if remark := prompts.truncation_note(
        own.prompts, policy.tokenizer, config.prompt_length - (start is not None)
    ):
        print(f"note: {remark}")
    if long := sum(len(reference) > most for reference in whole):
        words = ("has", "its") if long == 1 else ("have", "their")
        limit = f"more than {most} tokens (--response-length)"
        print(
            f"note: {long} of {len(whole)} references {words[0]} {limit}: rewards see {words[1]} beginning"
        )
    return encoded, own.references


class Outputs(NamedTuple):
    """Responses beside what they are compared with."""

    sample_untrained: list[Sample]
    responses: list[str]
    references: list[str]


class Evaluator:
    """A task's metrics on responses to held-out prompts."""

    def __init__(self, config: TaskConfig, policy: Policy, task: Task, judge: ExtraMetrics | None):
        self.task, self.judge = task, judge
        self.sampler = sampler.Sampler(
            config, policy, rows=min(64, config.test_rows), greedy=task.greedy
        )

    def outputs(self, state: TrainState, prompts: PromptSet, references: list[str]) -> Outputs:
        samples = self.sampler(state, prompts, seed=1001)
        return Outputs(samples, [sample.response.strip() for sample in samples], references)

    def numbers(self, found: Outputs) -> dict[str, float]:
        """The metrics, and `score` for the choice of a checkpoint: the first of them,
        the judge's own if it has one.
        """
        values = dict(metrics.evaluate(self.task.metrics, found.responses, found.references))
        values |= {} if self.judge is None else self.judge(found.samples)
        # of the likeliest responses the mean log-ratio is no KL
        if not self.task.greedy:
            values["kl"] = float(np.mean([sample.kl for sample in found.samples]))
        first = self.task.metrics[0]
        return {
            "score": -values[first] if first in tasks.LOWER_IS_BETTER else values[first],
            **values,
        }

    def compare(self, before: Outputs, after: Outputs) -> dict[str, Any]:
        """Both, the differences with intervals (paired bootstrap over the test
        examples), and every response.
        """
        gains = {}
        for name in self.task.metrics:
            metric = metrics.METRICS[name]
            gains[name] = [
                float(x)
                for x in metrics.paired_difference(
                    metric, before.responses, after.responses, before.references, seed=0
                )
            ]
        rows = zip(
            before.samples, before.responses, after.responses, before.references, strict=True
        )
        return {
            "supervised": self.numbers(before),
            "policy": self.numbers(after),
            "gain": gains,
            "test_rows": len(before.responses),
            "outputs": [
                {"prompt": s.prompt, "supervised": b, "policy": a, "reference": r}
                for s, b, a, r in rows
            ],
        }


def sample_untrained(
    config: TaskConfig, policy: Policy, task: Task, examples: Sequence[Example], *, seed: int
) -> list[Sample]:
    """A sample of the policy as it is, untrained, to each example's prompt."""
    prompts, _ = encode_examples(config, policy, task, examples)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    return sampler.Sampler(config, policy, rows=64)(state, prompts, seed=seed)


def evaluate_run(
    root: Path, name: str, *, rows: int, samples: int = 0, data: str = ""
) -> dict[str, Any]:
    """A run's policy on a task's test examples: {metric: [value, low, high]}, 95 %
    intervals by bootstrap over the examples; `outputs` has the responses. With
    `samples` > 1, `pass@k` too: the chance that one of k samples is right, for k = 1,
    2, 4, ...

    The examples are those of `data`, all of them (of the run's own data the test part),
    or the run's own where it is one of this task, or else the task's. One task of a run
    of several is put as that run has put it.

    Raises UserError for a folder without a run, an unknown task, or pass@k where no
    response is simply right.
    """
    config, policy, state = load.restore(root, kind=TaskConfig)
    together = json.loads((files.find_run(root) / "config.json").read_text()).get("tasks", [])
    if together and name not in together:
        raise UserError(
            f"--task {name}: {root} has learned several tasks; measure one of them, {', '.join(together)}"
        )
    own = config.data if config.task == name or together else ""
    config = dataclasses.replace(config, task=name, data=data or own)
    task = tasks.get_task(config)
    if samples > 1 and "exact" not in task.metrics:
        raise UserError(
            f"--samples counts right responses, but {name} is measured by {', '.join(task.metrics)}"
        )
    parts = sources.load_examples(config, policy.tokenizer)
    # a file that the run has not seen is measured whole; else what was held out of it
    examples = (
        parts.test if data in ("", own) else [*parts.train, *parts.validation, *parts.test]
    )[:rows]
    if together:
        examples, task = (
            tasks.multitask_examples(name, task, together.index(name), examples),
            tasks.without_formats(task),
        )
    prompts, references = encode_examples(config, policy, task, examples)
    found = Evaluator(config, policy, task, None).outputs(state, prompts, references)
    numbers: dict[str, Any] = {}
    for metric in task.metrics:
        interval = metrics.interval(metrics.METRICS[metric], found.responses, references, seed=0)
        numbers[metric] = [float(x) for x in interval]
    if samples > 1:
        draw = sampler.Sampler(config, policy, rows=min(64, rows))
        drawn = [draw(state, prompts, seed=seed) for seed in range(samples)]
        right = np.asarray(
            [
                [s.response.strip() == r for s, r in zip(one, references, strict=True)]
                for one in drawn
            ]
        ).sum(0)
        powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
        numbers |= {
            f"pass@{k}": float(np.mean(metrics.pass_at_k(right, samples, k))) for k in powers
        }
    lines = zip(found.samples, found.responses, references, strict=True)
    outputs = [{"prompt": s.prompt, "response": x, "reference": r} for s, x, r in lines]
    return {"task": name, "test_rows": len(references), **numbers, "outputs": outputs}
