"""Where the ablations are asked: `--scale` of each script.

ladder    toy tasks that can be learned whole, a network of 13,000 parameters made anew for every seed; minutes on a core
small     words spelt backwards, a transformer of .95 million parameters that was taught a little (once, in four minutes)
"""

from dataclasses import replace
from pathlib import Path

from jaxppo.ablation import AblationConfig, Arm, Claim, Question, Scale, ask
from jaxppo.config import UserError

__all__ = ["AblationConfig", "Arm", "Claim", "Question", "run"]


def ladder(tiny: bool, **settings) -> Scale:
    """The rungs that can be learned, or `tasks` of them, and other settings than theirs."""
    from jaxppo import algorithms, ladder

    tasks = settings.pop("tasks", ladder.CLIMB)
    config = replace(ladder.LadderConfig(), **settings)
    deal = lambda run: ladder.Deal(run.task)
    return Scale("ladder", config, tasks, ladder.load, ladder.reward, deal, algorithms.make_parts, ladder.judge)


def small(tiny: bool, **settings) -> Scale:
    """One of the language tasks, from a supervised baseline that is made once and kept in runs/ablations-<kind>-<width>."""
    from jaxppo import algorithms, measure, stages, tasks, train

    options = tasks.TaskConfig(
        task="spelling", tokens="bytes", width=160, prompt_length=24, response_length=16, sft_steps=200, sft_lr=1e-3, lora=0,
        batch_size=64, steps=40, lr=3e-4, kl_coef=0.0, kl_adaptive=False, eval_every=0, tiny=tiny,
    )  # fmt: skip
    options = replace(stages.smaller(options) if tiny else options, **settings)
    task, examples = tasks.task_of(options), tasks.load_examples(options)

    def load(config):
        root = Path(config.runs) / f"ablations-{config.model_kind}-{config.width}{'-tiny' * tiny}"
        # the same baseline for every seed and arm, whatever they change
        taught = replace(options, model_kind=config.model_kind, width=config.width, runs=config.runs)
        tuned = stages.baseline(taught, task, examples, root)
        return train.load_policy(replace(config, model=str(tuned), tiny=False))[1]

    policy = load(options)
    options = replace(options, eos=policy.tokenizer.eos_id, pad=policy.tokenizer.pad_id)
    prompts, _ = measure.prompt_set(options, policy, task, examples.train)
    reward = tasks.make_reward(options, policy).fn
    return Scale("small", options, (options.task,), load, reward, lambda run: prompts, algorithms.make_parts)


SCALES = {"ladder": ladder, "small": small}


def run(question: Question, options: AblationConfig, **settings) -> dict:
    """Ask it at the scale that the options name; `settings` are the question's own, for the scale of that name."""
    from jaxppo import train

    if options.scale not in SCALES:
        raise UserError(f"--scale {options.scale!r}: choose one of {', '.join(SCALES)}")
    train.use_compilation_cache()
    return ask(question, SCALES[options.scale](options.tiny, **settings.get(options.scale, {})), options)
