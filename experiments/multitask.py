"""Several tasks at once: one network, each task's rewards normalised among themselves.

Question   Does one network that learns two tasks together do as well on each as one of the same size that learns it alone?
Method     Every prompt begins with the name of its task. Examples are drawn with `--weights`; the policy gradient is that of PPO
           (https://arxiv.org/abs/1707.06347) on rewards that are whitened task by task
           (`--reward-norm task`).
Command    python experiments/multitask.py                     # --tasks spelling counting sums
           python experiments/multitask.py --tasks spelling --sft-steps 250 --steps 60     # alone, on as many examples of it
Found      Three seeds. Spelling, together: .837 -> .859, .650 -> .654, .975 -> .979 right (supervised -> policy); alone: .927 ->
           .912, .907 -> .912, .905 -> .910. Together less alone, at the end: -.053, -.258, +.069:
           not decided. Counting: .742 together and .786 alone (on other test examples), before and
           after, by saying "1" always. Policy optimisation adds nothing that is more than chance to
           either. A prompt of more than 44 bytes, as a quarter of counting's are, loses its
           beginning, and with it the task's name and the letter: it is counted in `exact`, and in
           neither task's own number.
Minutes    8 together, 4 alone, on a core that other work shared.
"""

from dataclasses import dataclass

from jaxppo import cli, tasks
from jaxppo.data.examples import Examples
from jaxppo.errors import UserError
from jaxppo.parallel import processes
from jaxppo.rewards import combine
from jaxppo.tasks import TaskConfig, metrics, rewards, sources, stages


@dataclass(frozen=True)
class Multitask(TaskConfig):
    task: str = "multitask"
    name: str = "multitask"
    tasks: tuple[str, ...] = ("spelling", "counting")
    """names of tasks that are scored by right responses"""
    weights: tuple[float, ...] = ()
    """how often each is drawn; empty = alike"""
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
    import dataclasses
    import json
    from pathlib import Path

    chosen = [tasks.task_of(dataclasses.replace(options, task=name)) for name in options.tasks]
    for name, task in zip(options.tasks, chosen):
        rewards.name_of(dataclasses.replace(options, task=name))
        if "exact" not in task.metrics:
            raise UserError(
                f"--tasks {name}: it is measured by {', '.join(task.metrics)}, and not by how many are right"
            )
    options = dataclasses.replace(
        options,
        num_tasks=len(chosen),
        reward_norm=options.reward_norm if len(chosen) > 1 else "none",
    )
    parts = [
        sources.load_examples(dataclasses.replace(options, task=name)) for name in options.tasks
    ]
    named = [
        Examples(*(tasks.as_one_of_many(name, task, number, part) for part in found))
        for number, (name, task, found) in enumerate(zip(options.tasks, chosen, parts, strict=True))
    ]
    examples = Examples(
        *(tasks.mixed(group, options.weights, seed=0) for group in zip(*named, strict=True))
    )
    together = tasks.Task("several tasks at once", "", "", ("exact",), response="{reference}")

    def make_reward(settings, policy) -> rewards.Reward:
        each = [
            rewards.make_reward(dataclasses.replace(settings, task=name), policy).fn
            for name in options.tasks
        ]
        return rewards.Reward(combine.by_task(each) if len(each) > 1 else each[0])

    done = stages.run(options, task=together, examples=examples, make_reward=make_reward)
    if not processes.is_main():
        return
    folder = Path(options.runs) / options.name
    outputs = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    for name in options.tasks:
        own = [row for row in outputs if row["prompt"].startswith(f"{name}: ")]
        columns = ([row[key] for row in own] for key in ("supervised", "policy", "reference"))
        supervised, policy, references = columns
        gain = [
            float(x)
            for x in metrics.paired(
                metrics.METRICS["exact"], supervised, policy, references, seed=0
            )
        ]
        found = {
            stage: metrics.evaluate(("exact",), texts, references)["exact"]
            for stage, texts in (("supervised", supervised), ("policy", policy))
        }
        done["gain"][f"exact {name}"] = gain
        for stage, value in found.items():
            done[stage][f"exact {name}"] = value
        print(f"{name}: {found['supervised']:.3f} -> {found['policy']:.3f} of {len(own)} right")
    stages.write(options, folder, done)


if __name__ == "__main__":
    cli.script(main, Multitask)
