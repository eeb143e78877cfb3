"""Seeds times settings as one compiled program, on toy tasks with a known optimum: a table with
intervals, and what it saved.

Question   Which value of a setting learns most, over eight seeds?
Method     `vmap` of the whole train step over seeds and over the values (`jaxppo.sweep`); the same seeds for every value, so that
           differences are paired; interquartile means with bootstrap intervals
           (https://arxiv.org/abs/2108.13264).
Command    python experiments/sweep.py --sweep clip_high=.2,.28,.4            # --sweep lr=1e-3,3e-3 temperature=.7,1 --loss gspo
"""

from dataclasses import dataclass

from jaxppo import ablation, algorithms, cli
from jaxppo.ablation import sweep, toy_tasks
from jaxppo.ablation.toy_tasks import CLIMB, LadderConfig
from jaxppo.errors import UserError
from jaxppo.run import load


@dataclass(frozen=True)
class Sweep(LadderConfig):
    sweep: tuple[str, ...] = ()
    """settings and their values, such as: clip_high=.2,.28,.4 lr=1e-3,3e-3; none = the settings as
    they are
    """
    seeds: int = 8
    """runs of every combination and task, from --seed on"""
    tasks: tuple[str, ...] = CLIMB
    """rungs of the ladder"""
    at_once: int = 64
    """most runs in one program"""
    results: str = ""
    """folder that gets sweep-ladder.json; empty = none"""
    alone: bool = True
    """measure what one run costs by itself, and say how much was saved"""


def main(options: Sweep) -> None:

    load.use_compilation_cache()
    if unknown := set(options.tasks) - set(toy_tasks.RUNGS):
        raise UserError(f"--tasks {sorted(unknown)[0]}: choose from {', '.join(toy_tasks.RUNGS)}")
    values = sweep.grid(sweep.parse(options.sweep), seeds=[0])
    arms = {run.arm: ablation.Arm(run.settings, first_seed=options.seed) for run in values}
    question = ablation.Question("sweep", arms, (), ("end", "area", "entropy", "kl"))
    deal = lambda run: toy_tasks.Deal(run.task)
    scale = ablation.Scale(
        "ladder",
        options,
        options.tasks,
        toy_tasks.load,
        toy_tasks.reward,
        deal,
        algorithms.make_parts,
    )
    asked = ablation.AblationConfig(
        seeds=options.seeds,
        at_once=options.at_once,
        results=options.results,
        tiny=options.tiny,
        steps=options.steps,
    )
    ablation.ask(question, scale, asked)
    if options.alone:
        settings = dict(next(iter(arms.values())).settings)
        seeds = range(options.seed, options.seed + options.seeds)
        runs = [sweep.Run("", seed, settings, task) for seed in seeds for task in options.tasks][
            : options.at_once or None
        ]
        print(
            sweep.saved(
                options,
                runs,
                toy_tasks.load,
                lambda s: algorithms.make_parts(s, toy_tasks.reward),
                deal,
            )
        )


if __name__ == "__main__":
    cli.script(main, Sweep)
