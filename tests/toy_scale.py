"""A small ladder of toy tasks, for tests of ablations."""

import dataclasses

from jaxppo import algorithms
from jaxppo.ablation import toy_tasks
from jaxppo.ablation.question import Scale

CONFIG = dataclasses.replace(toy_tasks.ToyConfig(), batch_size=32, minibatches=2, steps=30)
SCALE = Scale(
    "ladder",
    CONFIG,
    ("token", "prompt"),
    toy_tasks.load,
    toy_tasks.reward,
    lambda run: toy_tasks.RandomPrompts(run.task),
    algorithms.make_parts,
    toy_tasks.judge,
    toy_tasks.JUDGE_METRICS,
)
