"""A question: arms to compare, claims to test, and the scale to run them at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax

from jaxppo.ablation import sweep
from jaxppo.config import RunConfig
from jaxppo.data.prompts import BatchSource
from jaxppo.errors import UserError
from jaxppo.presets import preset
from jaxppo.run.policy import Policy
from jaxppo.types import Model, Parts, RewardFn, Rollout

# Metrics that every run has (`training.summarise`).
MEASURES = {"end", "area", "kl", "entropy", "mean_entropy", "length", "first_ratio_off"}


class Arm(NamedTuple):
    """One way to train."""

    settings: Mapping[str, Any] = {}
    """replace the scale's settings; `algorithm` names a preset, applied first"""
    parts: Callable[[Parts], Parts] | None = None
    """changes parts of the step that no setting names"""
    model: Callable[[Model], Model] | None = None
    """changes the model"""
    first_seed: int = 0
    """the arm's seeds start here"""
    times: Mapping[str, float] = {}
    """settings as multiples of the scale's, such as {"steps": 4}"""


class Claim(NamedTuple):
    """What a paper says, as an inequality between two arms."""

    says: str
    paper: str  # a link; empty for a claim of our own
    better: str
    worse: str
    metric: str = "end"
    """one of MEASURES or a metric of the judge; "-kl" means that less is better"""


class Question(NamedTuple):
    """The arms to train and the claims to test on them."""

    name: str
    arms: Mapping[str, Arm]  # the baseline first
    claims: Sequence[Claim]
    metrics: Sequence[str] = ("end", "area")  # shown besides those of the claims


class Scale(NamedTuple):
    """Where a question is asked: tasks, a network and its settings."""

    name: str
    config: RunConfig
    tasks: Sequence[str]
    load: Callable[[Any], Policy]
    reward: RewardFn
    prompts: Callable[[sweep.Run], BatchSource]
    make_parts: Callable[[Any, RewardFn], Parts]
    judge: Callable[[Rollout], dict[str, jax.Array]] | None = None
    """measures rollouts of the trained policy, inside the program; the arm's change of
    the model does not apply to them
    """
    judged: Sequence[str] = ()
    """names of the metrics that `judge` or `alone` returns besides MEASURES"""
    alone: Callable[[RunConfig, Arm, sweep.Run], dict[str, float]] | None = None
    """trains one run by itself, where several do not fit into one program, and returns
    its metrics; reads them from the run's folder if it has been trained before
    """
    seeds: int = 8
    """runs of each arm and task by default"""
    at_once: int = 64
    """most runs in one program by default"""
    rollouts: int = 256
    """the judge measures at least so many of each policy"""
    unseen: Callable[[sweep.Run], BatchSource] | None = None
    """the judge's prompts; None = the training prompts with new noise"""
    of_task: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """more settings of single tasks; such tasks are programs of their own"""


@dataclass(frozen=True)
class AblationConfig:
    """Options of every ablation script."""

    RANGES: ClassVar = dict.fromkeys(("seeds", "steps", "at_once"), "[0, inf)")

    scale: str = "ladder"
    """ladder (toy tasks, seconds) | a scale that the script adds"""
    seeds: int = 0
    """runs of each arm and task; 0 = the scale's default"""
    steps: int = 0
    """training steps; 0 = the scale's default"""
    at_once: int = 0
    """most runs in one program; 0 = the scale's default"""
    results: str = ""
    """folder that gets <question>-<scale>.json; empty = none"""
    runs: str = "runs"
    """folder that keeps what each run found, until the next call"""
    resume: bool = False
    """train only the runs that an earlier call has not finished"""
    tiny: bool = False
    """smoke test: two steps of two seeds; its record has -tiny in its name"""
    traceback: bool = False


def metric_names(question: Question) -> list[str]:
    """The metrics to show, then those of the claims."""
    claimed = [claim.metric.lstrip("-") for claim in question.claims]
    return list(dict.fromkeys([*question.metrics, *claimed]))


def check_question(question: Question, scale: Scale) -> None:
    """Raise UserError if a claim names an unknown arm, if the scale does not measure a
    metric, or if an arm sets `steps` (--steps would then change the other arms only).
    """
    for name, arm in question.arms.items():
        if "steps" in arm.settings:
            raise UserError(
                f"{question.name}: {name!r} sets steps; write them as a multiple: "
                "times={'steps': 4}"
            )
        if scale.alone and arm.model:
            raise UserError(
                f"{question.name}: {name!r} changes the model, which --scale {scale.name} "
                "cannot; leave that arm out"
            )
    for name in metric_names(question):
        if name not in MEASURES and name not in scale.judged:
            raise UserError(
                f"{question.name} asks for {name}, which is not measured at --scale {scale.name}"
            )
    for claim in question.claims:
        for name in (claim.better, claim.worse):
            if name not in question.arms:
                raise UserError(
                    f"a claim of {question.name} is about {name!r}: the arms are "
                    f"{', '.join(question.arms)}"
                )


def resolve_arm(arm: Arm, config: RunConfig, name: str = "") -> Arm:
    """Turn the arm's multiples into settings. Raises UserError for a fraction of a
    step.

    >>> arm = Arm({"epochs": 1}, times={"steps": 4, "lr": 3})
    >>> resolve_arm(arm, RunConfig(steps=20, lr=0.125)).settings
    {'epochs': 1, 'steps': 80, 'lr': 0.375}
    """
    settings = dict(arm.settings)
    for key, factor in arm.times.items():
        base = getattr(config, key)
        exact = round(base * factor, 12)
        settings[key] = type(base)(exact)
        if settings[key] != exact:
            raise UserError(
                f"{name!r} takes {factor:g} times {base} {key}, which is no whole number: "
                f"choose another --{key}"
            )
    return arm._replace(settings=settings, times={})


def arm_settings(config: RunConfig, arm: Arm) -> dict[str, Any]:
    """The arm's settings, and those of its preset that differ from the scale's."""
    settings = dict(arm.settings)
    if "algorithm" not in settings:
        return settings
    named = preset(config, settings["algorithm"])
    changed = {f.name: getattr(named, f.name) for f in fields(named)}
    return {name: x for name, x in changed.items() if x != getattr(config, name)} | settings
