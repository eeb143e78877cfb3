"""Several tasks at once: one network, with each task's rewards whitened separately.

Question   Does one network that learns two tasks together do as well on each as one of the same
           size that learns it alone?
Method     Every prompt begins with the name of its task. Examples are drawn with `--weights`; PPO
           (https://arxiv.org/abs/1707.06347) gets rewards that are whitened task by task
           (`--reward-norm task`).
Command    python experiments/multitask.py                     # --tasks spelling counting sums
           python experiments/multitask.py --tasks spelling --sft-steps 250 --steps 60
           # one task alone, on as many examples of it
Found      Three seeds. Spelling, together: .837 -> .859, .650 -> .654, .975 -> .979 right
           (supervised -> policy); alone: .927 -> .912, .907 -> .912, .905 -> .910. Together minus
           alone, at the end: -.053, -.258, +.069: not decided. Counting: .742 together and .786
           alone (on other test examples), before and after, by always writing "1". The gains of
           policy optimisation are within chance on both tasks. A prompt of more than 44 bytes (a
           quarter of counting's) loses its beginning, and with it the task's name and the letter,
           and was left out of the tasks' own numbers (now they count it).
Minutes    8 together, 4 alone, on a core that other work shared.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from jaxppo import cli, tasks
from jaxppo.data.examples import Examples
from jaxppo.errors import UserError
from jaxppo.parallel import processes
from jaxppo.rewards import combine
from jaxppo.tasks import TaskConfig, metrics, rewards, sources, stages


@dataclass(frozen=True)
class Multitask(TaskConfig):
    RANGES: ClassVar = {"weights": "(0, inf)"}

    task: str = "multitask"
    name: str = "multitask"
    tasks: tuple[str, ...] = ("spelling", "counting")
    """names of tasks whose metric is `exact`: the share of right responses"""
    weights: tuple[float, ...] = ()
    """share of each task; empty = as many examples as it has"""
    prompt_length: int = 44
    response_length: int = 12
    tokens: str = "bytes"
    width: int = 128
    layers: int = 3
    sft_steps: int = 500
    steps: int = 120
    batch_size: int = 192
    minibatches: int = 4
    reward_norm: str = "task"
    kl_coef: float = 0.02
    kl_adaptive: bool = False
    lr: float = 2e-4
    lora: int = 0
    eval_every: int = 20
    save_every: int = 20
    test_rows: int = 600


def main(options: Multitask) -> None:
    chosen = [tasks.get_task(replace(options, task=name)) for name in options.tasks]
    for name, task in zip(options.tasks, chosen):
        rewards.reward_name(replace(options, task=name))
        if "exact" not in task.metrics:
            raise UserError(
                f"--tasks {name}: it is measured by {', '.join(task.metrics)}, "
                "and not by how many are right"
            )
    reward_norm = options.reward_norm if len(chosen) > 1 else "none"
    options = replace(options, num_tasks=len(chosen), reward_norm=reward_norm)
    root = stages.check(options)
    together = tasks.Task("", "", ("exact",), response="{reference}")
    sized = stages.tiny_options(options) if options.tiny else options
    stages.check_resumed(sized, together, root)
    named = []
    for number, (name, task) in enumerate(zip(options.tasks, chosen)):
        own = sources.load_examples(replace(options, task=name))
        named.append([tasks.multitask_examples(name, task, number, part) for part in own])
    parts = zip(*named, strict=True)  # training, validation and test of all tasks
    examples = Examples(*(tasks.mix_tasks(part, options.weights, seed=0) for part in parts))

    def make_reward(settings, policy) -> rewards.Reward:
        make = lambda name: rewards.make_reward(replace(settings, task=name), policy).fn
        each = [make(name) for name in options.tasks]
        return rewards.Reward(combine.by_task(each) if len(each) > 1 else each[0])

    done = stages.run(options, task=together, examples=examples, make_reward=make_reward)
    if processes.is_main():
        task_of_row = [x.extra["task"] for x in examples.test[: done["test_rows"]]]
        report(options, done, task_of_row)


def report(options: Multitask, done: dict, task_of_row: list[int]) -> None:
    """Add each task's own shares of right responses to result.json, and print them.
    `task_of_row`: the number of each test row's task.
    """
    folder = Path(options.runs) / options.name
    outputs = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    start = stages.start_name(options)
    for number, name in enumerate(options.tasks):
        own = [row for row, task in zip(outputs, task_of_row, strict=True) if task == number]
        if not own:  # a small test may have no row of a rare task
            continue
        references = [row["reference"] for row in own]
        for metric, suffix in (("exact", ""), ("sampled_exact", "_sample")):
            before, after = ([row[stage + suffix] for row in own] for stage in (start, "policy"))
            gain = metrics.paired_difference(
                metrics.METRICS["exact"], before, after, references, seed=0
            )
            done["gain"][f"{metric} {name}"] = [float(x) for x in gain]
            for stage, texts in ((start, before), ("policy", after)):
                found = metrics.evaluate(("exact",), texts, references)["exact"]
                done[stage][f"{metric} {name}"] = found
            earlier, later = (done[stage][f"{metric} {name}"] for stage in (start, "policy"))
            print(f"{metric} {name}: {earlier:.3f} -> {later:.3f} of {len(own)}")
    stages.write_result(options, folder, done)


if __name__ == "__main__":
    cli.script(main, Multitask)
