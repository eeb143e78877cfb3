"""Sweep seeds and settings as one compiled program, on toy tasks with a known optimum.

Question   Which value of a setting learns most, over eight seeds?
Method     `vmap` of the whole train step over seeds and values (`jaxppo.ablation.sweep`). Every
           value has the same seeds, so differences are paired. The table has interquartile means
           with bootstrap intervals (https://arxiv.org/abs/2108.13264).
Command    python experiments/sweep.py --sweep clip_high=.2,.28,.4
           # --sweep lr=1e-3,3e-3 temperature=.7,1 --loss gspo
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from jaxppo import algorithms, cli
from jaxppo.ablation import sweep, toy_tasks
from jaxppo.ablation.question import AblationConfig, Arm, Question, Scale
from jaxppo.ablation.toy_tasks import LEARNABLE, ToyConfig
from jaxppo.ablation.training import run_ablation
from jaxppo.errors import UserError
from jaxppo.run import load


@dataclass(frozen=True)
class Sweep(ToyConfig):
    RANGES: ClassVar = {"seeds": "(0, inf)", "at_once": "[0, inf)"}

    sweep: tuple[str, ...] = ()
    """settings and their values, such as: clip_high=.2,.28,.4 lr=1e-3,3e-3; none = the settings as
    they are
    """
    seeds: int = 8
    """runs of every combination and task, from --seed on"""
    tasks: tuple[str, ...] = LEARNABLE
    """toy tasks (`jaxppo.ablation.toy_tasks`)"""
    at_once: int = 64
    """most runs in one program"""
    results: str = ""
    """folder that gets sweep-ladder.json; empty = none"""
    alone: bool = True
    """also time a run by itself, and print the speedup"""


def main(options: Sweep) -> None:
    load.use_compilation_cache()
    if unknown := set(options.tasks) - set(toy_tasks.TASKS):
        raise UserError(f"--tasks {sorted(unknown)[0]}: choose from {', '.join(toy_tasks.TASKS)}")
    combinations = sweep.grid(sweep.parse_values(options.sweep), seeds=[0])
    arms = {run.arm: Arm(run.settings, first_seed=options.seed) for run in combinations}
    scale = Scale(
        "ladder",
        options,
        options.tasks,
        toy_tasks.load,
        toy_tasks.reward,
        lambda run: toy_tasks.RandomPrompts(run.task),
        algorithms.make_parts,
    )
    asked = AblationConfig(
        seeds=options.seeds,
        at_once=options.at_once,
        results=options.results,
        tiny=options.tiny,
        steps=options.steps,
        runs=options.runs,
        resume=options.resume,
    )
    run_ablation(Question("sweep", arms, (), ("end", "area", "entropy", "kl")), scale, asked)
    if options.alone:
        settings = dict(combinations[0].settings)
        seeds = range(options.seed, options.seed + options.seeds)
        runs = [sweep.Run("", seed, settings, task) for seed in seeds for task in options.tasks]
        print_speedup(options, scale, runs[: options.at_once or None])


def print_speedup(options: Sweep, scale: Scale, runs: Sequence[sweep.Run]) -> None:
    """Time a step of all runs together and of the first run alone, without compilation."""
    steps = 10 * options.steps_per_call
    short = replace(options, steps=steps, save_every=steps)
    make_parts = lambda settings: algorithms.make_parts(settings, toy_tasks.reward)

    def seconds(runs: Sequence[sweep.Run]) -> float:
        times: list[float] = []
        on_step = lambda done, metrics: times.append(time.monotonic())
        sweep.run(short, runs, scale.load, make_parts, scale.prompts, on_step=on_step)
        return float(np.median(np.diff(times)))  # from the first dispatch on, which compiles

    together, alone = seconds(runs), seconds(runs[:1])
    print(
        f"a step of {len(runs)} runs at once: {together:.3f} s; of one alone: {alone:.3f} s; "
        f"one after the other they would take {len(runs) * alone / together:.1f} times as long"
    )


if __name__ == "__main__":
    cli.script(main, Sweep)
