"""Where the ablations are asked: `--scale` of each script."""

from dataclasses import replace

from jaxppo.ablation import AblationConfig, Arm, Claim, Question, Scale, ask
from jaxppo.config import UserError

__all__ = ["AblationConfig", "Arm", "Claim", "Question", "run"]


def ladder(**settings) -> Scale:
    """The rungs that can be learned, or `tasks` of them, and other settings than theirs."""
    from jaxppo import algorithms, ladder

    tasks = settings.pop("tasks", ladder.CLIMB)
    config = replace(ladder.LadderConfig(), **settings)
    deal = lambda run: ladder.Deal(run.task)
    return Scale("ladder", config, tasks, ladder.load, ladder.reward, deal, algorithms.make_parts, ladder.judge)


SCALES = {"ladder": ladder}


def run(question: Question, options: AblationConfig, **settings) -> dict:
    """Ask it at the scale that the options name; `settings` are the question's own, for the scale of that name."""
    from jaxppo import train

    if options.scale not in SCALES:
        raise UserError(f"--scale {options.scale!r}: choose one of {', '.join(SCALES)}")
    train.use_compilation_cache()
    return ask(question, SCALES[options.scale](**settings.get(options.scale, {})), options)
