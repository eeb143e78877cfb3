"""Measure a policy on a task's held-out examples: responses, metrics, intervals."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxppo import ppo, tasks
from jaxppo.data import prompts
from jaxppo.data.examples import Example, Examples
from jaxppo.data.prompts import PromptSet
from jaxppo.data.rows import inside
from jaxppo.errors import UserError
from jaxppo.rewards import at_k
from jaxppo.run import files, load
from jaxppo.run.policy import Policy
from jaxppo.run.sampler import Sample, Sampler
from jaxppo.tasks import Task, TaskConfig, metrics, sources
from jaxppo.types import TrainState

ExtraMetrics = Callable[[list[Sample]], dict[str, float]]
EXTRA_TYPES = {"context": np.float32, "context_length": np.int32, "task": np.int32}


class FormattedExamples(NamedTuple):
    """Examples in a task's formats."""

    prompts: list[str]
    responses: list[str]  # what the supervised stage teaches
    references: list[str]
    extra: dict[str, np.ndarray]  # [N ...] arrays that the program reads


def format_examples(task: Task, examples: Sequence[Example]) -> FormattedExamples:
    """Format examples. Raises UserError for an example without a field of the task."""
    first = examples[0].extra
    if task.source == "speech" and "context" not in first:
        raise UserError(
            'recordings need "context" (frames of features) and "context_length",'
            " next to prompt and reference"
        )
    return FormattedExamples(
        [tasks.format_prompt(task, x) for x in examples],
        [task.response.format(reference=x.reference) for x in examples],
        [x.reference if task.expected is None else task.expected(x.reference) for x in examples],
        {
            name: np.stack([np.asarray(x.extra[name], dtype) for x in examples])
            for name, dtype in EXTRA_TYPES.items()
            if not isinstance(first.get(name, ""), str)
        },
    )


def encode_examples(
    config: TaskConfig, policy: Policy, task: Task, examples: Sequence[Example]
) -> tuple[PromptSet, list[str]]:
    """Return (prompts with the token ids of their references, references as text).

    Long prompts lose their beginning and long references their end; a printed note says
    how many.
    """
    formatted, limit = format_examples(task, examples), config.response_length
    texts = formatted.responses if task.expected is None else formatted.references
    ids = [*map(inside(policy.tokenizer.encode), texts)]
    if task.expected is not None:
        limit = max(map(len, ids))
    padded = np.zeros((len(ids), limit), np.int32)
    for row, reference in enumerate(ids):
        padded[row, : len(reference)] = reference[:limit]
    lengths = np.asarray([min(len(reference), limit) for reference in ids], np.int32)
    start = prompts.start_token(config, policy.tokenizer)
    if start is None and task.start:
        start = policy.tokenizer.start_id
    encoded = prompts.encode(
        formatted.prompts,
        policy.tokenizer,
        config.prompt_length,
        too_long="last",
        extra={"reference": padded, "reference_length": lengths, **formatted.extra},
        start=start,
    )
    room = config.prompt_length - len(prompts.as_ids(start))
    if note := prompts.truncation_note(formatted.prompts, policy.tokenizer, room):
        print(f"note: {note}")
    if long := sum(len(reference) > limit for reference in ids):
        have, their = ("has", "its") if long == 1 else ("have", "their")
        print(
            f"note: {long} of {len(ids)} references {have} more than {limit} tokens"
            f" (--response-length): rewards see {their} beginning"
        )
    return encoded, formatted.references


class Outputs(NamedTuple):
    """Responses and their references."""

    samples: list[Sample]
    responses: list[str]  # what is measured: the greedy responses (or none), or those of `samples`
    references: list[str]

    @property
    def sampled(self) -> list[str]:
        """The samples' texts."""
        return _texts(self.samples)


def _texts(samples: Sequence[Sample]) -> list[str]:
    return [sample.response.strip() for sample in samples]


class Evaluator:
    """Responds to held-out prompts and computes a task's metrics.

    A task with `greedy` is measured on greedy responses, and its first metric on
    samples, too, under the name `sampled_` + metric: the policy gradient raises the
    reward of samples.
    """

    def __init__(
        self, config: TaskConfig, policy: Policy, task: Task, extra_metrics: ExtraMetrics | None
    ):
        self.task, self.extra_metrics = task, extra_metrics
        self.sampled_metric = f"sampled_{task.metrics[0]}" if task.greedy else task.metrics[0]
        make = partial(Sampler, config, policy, rows=min(64, config.test_rows))
        self.draw, self.greedy = make(), make(greedy=True) if task.greedy else None

    def sample(
        self, state: TrainState, prompts: PromptSet, references: list[str], *, greedy: bool = True
    ) -> Outputs:
        """Sample one response per prompt, and find the greedy one. Without `greedy`,
        a task measured on greedy responses has samples alone, for half the work.
        """
        samples = self.draw(state, prompts, seed=1001)
        if self.greedy is None:
            return Outputs(samples, _texts(samples), references)
        measured = self.greedy(state, prompts, seed=0) if greedy else []
        return Outputs(samples, _texts(measured), references)

    def texts(self, outputs: Outputs) -> dict[str, tuple[str, list[str]]]:
        """Return (metric of `metrics.METRICS`, responses) by the name in results, of
        the responses that there are.
        """
        first, *others = self.task.metrics
        found = {first: (first, outputs.responses), self.sampled_metric: (first, outputs.sampled)}
        found |= {name: (name, outputs.responses) for name in others}
        return {name: pair for name, pair in found.items() if pair[1]}

    def compute(self, outputs: Outputs) -> dict[str, float]:
        """Compute the metrics, and `score`, by which the best checkpoint is chosen: the
        first metric of samples, unless the extra metrics have their own.
        """
        values = {
            name: metrics.evaluate((metric,), responses, outputs.references)[metric]
            for name, (metric, responses) in self.texts(outputs).items()
        }
        if self.extra_metrics is not None:
            values |= self.extra_metrics(outputs.samples)
        values["kl"] = float(np.mean([sample.kl for sample in outputs.samples]))
        sign = -1 if self.task.metrics[0] in tasks.LOWER_IS_BETTER else 1
        return {"score": sign * values[self.sampled_metric], **values}

    def compare(
        self, before: Outputs, after: Outputs, *, start: str = "supervised"
    ) -> dict[str, Any]:
        """Return the metrics of both, the gains with intervals, and every response.
        `start` names what came before.
        """
        later, references = self.texts(after), before.references
        gains = {
            name: metrics.paired_difference(
                metrics.METRICS[metric], earlier, later[name][1], references, seed=0
            )
            for name, (metric, earlier) in self.texts(before).items()
        }
        responses = {start: before.responses, "policy": after.responses}
        if self.task.greedy:
            responses |= {f"{start}_sample": before.sampled, "policy_sample": after.sampled}
        prompts = [sample.prompt for sample in before.samples]
        columns = {"prompt": prompts, **responses, "reference": references}
        return {
            start: self.compute(before),
            "policy": self.compute(after),
            "gain": {name: list(gain) for name, gain in gains.items()},
            "test_rows": len(prompts),
            "outputs": [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)],
        }


def sample_untrained(
    config: TaskConfig, policy: Policy, task: Task, examples: Sequence[Example], *, seed: int
) -> list[Sample]:
    """Sample one response per example from the untrained policy."""
    prompts, _ = encode_examples(config, policy, task, examples)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    return Sampler(config, policy, rows=64)(state, prompts, seed=seed)


def same_source(one: str, other: str) -> bool:
    """Whether two values of --data name one file or hub data set.

    >>> same_source("pairs.jsonl", "./pairs.jsonl"), same_source("", ".")
    (True, False)
    """
    place = lambda data: Path(data).expanduser().resolve()
    return bool(one and other) and place(one) == place(other)


def evaluate_run(
    root: Path,
    name: str,
    *,
    rows: int,
    samples: int = 0,
    data: str = "",
    checkpoint: str | int = "best",
    raw: bool = False,
) -> dict[str, Any]:
    """Measure a run's policy on examples of a task: {metric: [value, low, high]} with
    95 % bootstrap intervals, and all `outputs`.

    With `samples` > 1 also pass@k, the chance that one of k samples is right, for
    k = 1, 2, 4, ... and `samples`.

    The examples are all of `data`; without it, the test part of the run's own data or,
    for another task, of the task's. A run of several tasks is measured on one of them,
    with the prompts that it was trained on. `checkpoint` is best, newest or a step;
    `raw` as in `load.restore`.

    Raises UserError without a run or checkpoint, for an unknown task, and for pass@k of
    a task without the metric "exact".
    """
    config, policy, state = load.restore(root, kind=TaskConfig, checkpoint=checkpoint, raw=raw)
    together = json.loads((files.find_run(root) / "config.json").read_text()).get("tasks", [])
    if together and name not in together:
        raise UserError(
            f"--task {name}: {root} was trained on several tasks;"
            f" measure one of them, {', '.join(together)}"
        )
    trained_on = config.data
    own = trained_on if config.task == name or together else ""
    if config.task != name:  # the run's prompts are of its own task
        config = dataclasses.replace(config, prompt_format="")
    config = dataclasses.replace(config, task=name, data=data or own)
    task = tasks.get_task(config)
    if samples > 1 and "exact" not in task.metrics:
        raise UserError(
            f"--samples counts right responses, but {name} is measured by {', '.join(task.metrics)}"
        )
    parts = sources.load_examples(config, policy.tokenizer)
    if data and not same_source(data, trained_on):  # the run was not trained on any of it
        parts = Examples([], [], [*parts.train, *parts.validation, *parts.test])
    examples = parts.test[:rows]
    if together:
        examples = tasks.multitask_examples(name, task, together.index(name), examples)
        task = tasks.without_formats(task)
    prompts, references = encode_examples(config, policy, task, examples)
    evaluator = Evaluator(config, policy, task, None)
    found = evaluator.sample(state, prompts, references)
    values: dict[str, Any] = {
        name: list(metrics.interval(metrics.METRICS[metric], responses, references, seed=0))
        for name, (metric, responses) in evaluator.texts(found).items()
    }
    if samples > 1:
        drawn = [evaluator.draw(state, prompts, seed=seed) for seed in range(samples)]
        pairs = [zip(row, references, strict=True) for row in drawn]
        right = np.array([[metrics.same(x.response, r) for x, r in row] for row in pairs])
        values |= at_k.pass_at_powers(right.T)
    lines = zip(found.samples, found.responses, references, strict=True)
    outputs = [{"prompt": s.prompt, "response": x, "reference": r} for s, x, r in lines]
    about = {"task": name, "step": int(state.step), "test_rows": len(references)}
    return {**about, **values, "outputs": outputs}
