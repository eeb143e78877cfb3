"""Several tasks at once: one network, with each task's rewards whitened separately.

Question   Does one network that learns three tasks together do as well on each as one of the same
           size that learns it alone, on as many examples of it?
Method     SmolLM2-135M with adapters labels reviews, adds numbers and answers quiz questions.
           Every prompt begins with the name of its task, and tasks are drawn equally often
           (`--weights`). Supervised, then the leave-one-out policy gradient
           (https://arxiv.org/abs/2402.14740) with clipped ratios and rewards that are whitened task
           by task (`--reward-norm task`).
Command    python experiments/multitask.py
           # one task alone, on as many examples of it:
           python experiments/multitask.py --name label-alone --tasks sentiment_label
             --sft-batch-size 4 --batch-size 32 --test-rows 100
           python experiments/multitask.py --name sums-alone --tasks sums --prompt-length 16
             --sft-batch-size 4 --batch-size 32 --test-rows 100
           python experiments/multitask.py --name quiz-alone --tasks question_answering
             --prompt-length 24 --sft-batch-size 4 --batch-size 32 --test-rows 100
Data       As in `sentiment_label.py`, `reasoning.py` and `question_answering.py`. Held-out examples
           are the first ones of each task, the same together and alone.
Found      Not decided. 100 test examples of each task, share right, together minus alone after both
           stages (95 % interval over seeds): labels, five seeds, samples -.020 (-.056 to +.016),
           greedy -.010 (-.044 to +.024); sums, five seeds, samples +.004 (-.019 to +.027), greedy
           -.010 (-.062 to +.042); quiz, three seeds, samples -.020 (-.063 to +.023), greedy -.047
           (-.147 to +.054). The first three seeds alone had -.040 (-.065 to -.015) for samples of
           labels. Together, the quiz's 514 questions are repeated to a third of all examples and
           drawn at random: the supervised stage sees 320 different ones, alone 480. The policy
           stage adds .024 (-.006 to +.054) to samples of labels, and nothing to sums. SmolLM2
           cannot spell backward: its tokens are pieces of words, and after 640 examples the loss is
           3.7 a token.
Minutes    10 to 21 together, 4 to 10 alone, on a core that other work shared; with all measurements
           up to 31 and 15.
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
from jaxppo.run.policy import Policy
from jaxppo.tasks import TaskConfig, metrics, rewards, sources, stages


@dataclass(frozen=True)
class Multitask(TaskConfig):
    RANGES: ClassVar = {"weights": "(0, inf)"}
    UNREAD: ClassVar = dict.fromkeys(("data", "prompt_format"), "each task has its own")

    task: str = "multitask"
    name: str = "multitask"
    tasks: tuple[str, ...] = ("sentiment_label", "sums", "question_answering")
    """names of tasks whose metric is `exact`: the share of right responses"""
    weights: tuple[float, ...] = ()
    """share of each task in training; empty = equal shares"""
    model: str = "smollm2"
    prompt_length: int = 48
    response_length: int = 6
    lora: int = 16
    lora_on: str = "all"
    sft_steps: int = 120
    sft_batch_size: int = 12
    sft_lr: float = 1e-3
    sft_eval_every: int = 60
    steps: int = 40
    batch_size: int = 96
    minibatches: int = 2
    group_size: int = 8
    advantage: str = "rloo"
    value_loss: str = "none"
    reward_norm: str = "task"
    kl_coef: float = 0.02
    kl_adaptive: bool = False
    lr: float = 5e-4
    eval_every: int = 20
    save_every: int = 20
    test_rows: int = 300


def main(options: Multitask) -> None:
    chosen = [tasks.get_task(replace(options, task=name)) for name in options.tasks]
    for name, task in zip(options.tasks, chosen):
        rewards.reward_name(replace(options, task=name))
        if "exact" not in task.metrics:
            raise UserError(
                f"--tasks {name}: it is measured by {', '.join(task.metrics)}, "
                "and not by how many are right"
            )
    options = replace(options, num_tasks=len(chosen))
    if len(chosen) == 1 and options.reward_norm == "task":
        options = replace(options, reward_norm="batch")  # all rows are its own
    together = tasks.Task("", "", ("exact",), response="{reference}")

    def load_examples() -> Examples:
        """Training examples by `weights`; in the other parts the tasks are in turn."""
        named = []
        for number, (name, task) in enumerate(zip(options.tasks, chosen)):
            own = sources.load_examples(replace(options, task=name))
            named.append([tasks.multitask_examples(name, task, number, part) for part in own])
        training, *held_out = zip(*named, strict=True)
        in_turn = lambda groups: [x for row in zip(*groups) for x in row]
        mixed = tasks.mix_tasks(training, options.weights, seed=0)
        return Examples(mixed, *map(in_turn, held_out))

    done = stages.run(options, task=together, examples=load_examples, make_reward=own_rewards)
    if processes.is_main():
        report(options, done)


def own_rewards(options: Multitask, policy: Policy) -> rewards.Reward:
    """Each row's reward is that of its task."""
    make = lambda name: rewards.make_reward(replace(options, task=name), policy)
    each = [make(name) for name in options.tasks]
    if len(each) == 1:
        return each[0]
    params = {str(number): x.params for number, x in enumerate(each)}
    return rewards.Reward(combine.by_task([x.fn for x in each]), params)


def report(options: Multitask, done: dict) -> None:
    """Add each task's own shares of right responses to result.json, and print them. The
    test rows have the tasks in turn.
    """
    folder = Path(options.runs) / options.name
    outputs = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    start = stages.start_name(options)
    for number, name in enumerate(options.tasks):
        own = outputs[number :: len(options.tasks)]
        if not own:  # --test-rows is smaller than the number of tasks
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
