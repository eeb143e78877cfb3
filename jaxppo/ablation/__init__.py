"""One question, its arms, and what they say: every arm on the same seeds, compared pair
by pair, with a verdict on a claim.

An `Arm` is settings, or a change of the parts or of the model that no setting names.
Arms that can share a program do, with all their seeds (`sweep`). A `Claim` says
beforehand which arm is better, by which measure; it is "agrees" or "disagrees" only
where `statistics.difference` decides, else "not decided". The record of it all is JSON,
and the same for the same seeds.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxppo.ablation import sweep
from jaxppo.ablation.statistics import FEW, Difference, bootstrap, difference, iqm, over_seeds
from jaxppo.config import RunConfig
from jaxppo.data.prompts import Batches
from jaxppo.errors import UserError
from jaxppo.presets import preset
from jaxppo.run import files, log
from jaxppo.run.load import Policy
from jaxppo.run.sampler import responses
from jaxppo.types import Model, Parts, RewardFn, Rollout

TAIL = 10  # parts of a run, of which the last is its end

MEASURES = {
    "end",
    "area",
    "kl",
    "entropy",
    "mean_entropy",
    "length",
    "first_ratio_off",
}  # of every run

# rollouts of each policy that a judge reads, or as many more as a batch has
JUDGED = 256


class Arm(NamedTuple):
    """One way to train."""

    settings: Mapping[str, Any] = {}
    """in place of the scale's own; `algorithm` names a preset whose settings come
    first
    """
    parts: Callable[[Parts], Parts] | None = None
    """changes parts that no setting names"""
    model: Callable[[Model], Model] | None = None
    """changes the model"""
    first_seed: int = 0
    """other seeds than the other arms"""
    times: Mapping[str, float] = {}
    """settings as multiples of the scale's own, such as {"steps": 4}"""


class Claim(NamedTuple):
    """What a paper says, as an inequality between two arms."""

    says: str
    paper: str  # a link; empty where the claim is our own
    better: str
    worse: str
    metric: str = "end"
    """a name of `measures`, or of the scale's judge; its sign is turned by a leading
    minus: less is better
    """


class Question(NamedTuple):
    """What is asked."""

    name: str
    arms: Mapping[str, Arm]  # the first is what the others are shown against
    claims: Sequence[Claim]
    # that the table shows, the claims' own aside
    metrics: Sequence[str] = ("end", "area")


class Scale(NamedTuple):
    """Where it is asked: a task, or several, and a network."""

    name: str
    config: RunConfig
    tasks: Sequence[str]
    load: Callable[[Any], Policy]
    reward: RewardFn
    prompts: Callable[[sweep.Run], Batches]
    make_parts: Callable[[Any, RewardFn], Parts]
    judge: Callable[[Rollout], dict[str, jax.Array]] | None = None
    """in the program; what it says of rollouts of the trained policy, sampled without
    what an arm has changed of the model
    """
    judged: Sequence[str] = ()
    """the names of the judge's numbers, or of those that `alone` has beside MEASURES"""
    alone: Callable[[RunConfig, Arm, sweep.Run], dict[str, float]] | None = None
    """trains one run where several do not fit into a program, and says its numbers;
    what it has done it need not do again
    """
    seeds: int = 8
    """runs of each arm and task, unless the options say more"""
    at_once: int = 64
    """most runs in one program, unless the options say less"""
    unseen: Callable[[sweep.Run], Batches] | None = None
    """what the judge has answered; where there is none, the prompts of the training,
    with noise that no step has seen
    """


@dataclass(frozen=True)
class AblationConfig:
    """Options of every script of an ablation."""

    scale: str = "ladder"
    """ladder (toy tasks, seconds) | a scale that the script adds"""
    seeds: int = 0
    """runs of each arm and task; 0 = as the scale has them"""
    steps: int = 0
    """training steps; 0 = as the scale has them"""
    at_once: int = 0
    """most runs in one program; 0 = as the scale has them"""
    results: str = ""
    """folder that gets <question>-<scale>.json; empty = none"""
    tiny: bool = False
    """smoke test: two steps of two seeds; its record has -tiny in its name"""
    traceback: bool = False


def ask(question: Question, scale: Scale, options: AblationConfig) -> dict[str, Any]:
    """Train every arm on every task and seed; print the table and the verdicts; the
    record, which is written, too.

    Raises UserError for a claim about an arm or a number that is not there, or settings
    that cannot run.
    """
    check(question, scale)
    for name, least in (("seeds", 0), ("steps", 0), ("at_once", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    seeds, steps = (
        (2, 2)
        if options.tiny
        else (options.seeds or scale.seeds, options.steps or scale.config.steps)
    )
    save_every = scale.config.save_every if scale.alone else steps
    scale = scale._replace(
        config=dataclasses.replace(scale.config, steps=steps, save_every=save_every, tiny=False)
    )
    whole = lambda arm: (
        arm
        if not options.tiny
        else arm._replace(times={k: x for k, x in arm.times.items() if k != "steps"})
    )
    question = question._replace(
        arms={name: resolved(whole(arm), scale.config, name) for name, arm in question.arms.items()}
    )
    started, rows = time.monotonic(), []
    for name, arm in question.arms.items():
        rows += [
            (name, arm, task, seed)
            for task in scale.tasks
            for seed in range(arm.first_seed, arm.first_seed + seeds)
        ]
    if set(metrics(question)) <= MEASURES:  # nothing asks for the judge
        scale = scale._replace(judge=None)
    found = (
        by_itself(scale, rows)
        if scale.alone
        else [
            row
            for group in programs(scale, rows, options.at_once or scale.at_once)
            for row in train(scale, *group)
        ]
    )
    order = {name: number for number, name in enumerate(question.arms)}
    found.sort(key=lambda row: (order[row["arm"]], scale.tasks.index(row["task"]), row["seed"]))
    record = conclude(question, scale, found)
    minutes = (
        sum(row.pop("minutes") for row in found)
        if scale.alone
        else (time.monotonic() - started) / 60
    )
    record |= {"about": {"versions": files.versions(), "minutes": round(minutes, 2)}}
    show(question, record)
    if place := files.keep_record(
        options.results, f"{question.name}-{scale.name}{'-tiny' * options.tiny}", record
    ):
        print(f"written: {place}")
    return record


def check(question: Question, scale: Scale) -> None:
    """Raise UserError where a claim names an arm that is not there, or something is
    asked that nobody measures at this scale, or an arm has a number of steps of its own
    (`Arm.times` is for that: --steps would change the others alone).
    """
    for name, arm in question.arms.items():
        if "steps" in arm.settings:
            raise UserError(
                f"{question.name}: {name!r} sets steps; write them as a multiple: times={{'steps': 4}}"
            )
        if scale.alone and arm.model:
            raise UserError(
                f"{question.name}: {name!r} changes the model, which runs at --scale {scale.name} do not"
            )
    if unknown := [
        name for name in metrics(question) if name not in MEASURES and name not in scale.judged
    ]:
        raise UserError(
            f"{question.name} asks for {unknown[0]}, which is not measured at --scale {scale.name}"
        )
    for claim in question.claims:
        for name in (claim.better, claim.worse):
            if name not in question.arms:
                raise UserError(
                    f"a claim of {question.name} is about {name!r}: the arms are {', '.join(question.arms)}"
                )


def metrics(question: Question) -> list[str]:
    """The names of all numbers that the question is about."""
    return list(
        dict.fromkeys([*question.metrics, *(claim.metric.lstrip("-") for claim in question.claims)])
    )


def resolved(arm: Arm, config: RunConfig, name: str = "") -> Arm:
    """The arm with its multiples as settings. Raises UserError where a count comes out
    broken.

    >>> resolved(
    ...     Arm({"epochs": 1}, times={"steps": 4, "lr": 3}), RunConfig(steps=20, lr=0.125)
    ... ).settings
    {'epochs': 1, 'steps': 80, 'lr': 0.375}
    """
    found = dict(arm.settings)
    for key, factor in arm.times.items():
        own = getattr(config, key)
        found[key] = type(own)(round(own * factor, 12))
        if found[key] != round(own * factor, 12):
            raise UserError(
                f"{name!r} takes {factor:g} times {own} {key}, which is no whole number: choose another --{key}"
            )
    return arm._replace(settings=found, times={})


Row = tuple[str, Arm, str, int]


def programs(
    scale: Scale, rows: Sequence[Row], at_once: int
) -> list[tuple[RunConfig, Arm, list[sweep.Run]]]:
    """The runs, grouped by what can be one program, at most so many in each."""
    groups: dict[tuple, tuple[Arm, list[sweep.Run]]] = {}
    for name, arm, task, seed in rows:
        run = sweep.Run(name, seed, settings_of(scale.config, arm), task)
        groups.setdefault((id(arm.parts), id(arm.model)), (arm, []))[1].append(run)
    out = []
    for arm, runs in groups.values():
        for same in sweep.programs(runs, scale.config):
            # parts of equal size where that can be: one program serves them all
            parts = -(-len(same) // at_once)
            size = -(-len(same) // parts)
            out += [
                (scale.config, arm, same[start : start + size])
                for start in range(0, len(same), size)
            ]
    return out


def settings_of(config: RunConfig, arm: Arm) -> dict[str, Any]:
    """The arm's settings; those of a preset in full, as far as they differ from the
    scale's.
    """
    if "algorithm" not in arm.settings:
        return dict(arm.settings)
    named = preset(config, arm.settings["algorithm"])
    changed = {f.name: getattr(named, f.name) for f in dataclasses.fields(named)}
    return {name: x for name, x in changed.items() if x != getattr(config, name)} | dict(
        arm.settings
    )


def train(scale: Scale, config: RunConfig, arm: Arm, runs: list[sweep.Run]) -> list[dict[str, Any]]:
    """The rows of a record that one program gives."""

    def load(settings: Any) -> Policy:
        policy = scale.load(settings)
        return dataclasses.replace(policy, model=arm.model(policy.model)) if arm.model else policy

    def make_parts(settings: Any) -> Parts:
        parts = scale.make_parts(settings, scale.reward)
        return arm.parts(parts) if arm.parts else parts

    names = sorted({run.arm for run in runs})
    print(f"{len(runs)} runs at once: {', '.join(names)}", flush=True)
    results = sweep.run(config, runs, load, make_parts, scale.prompts)
    judged = [{}] * len(results) if scale.judge is None else judgements(scale, runs, results)
    return [
        {"arm": result.run.arm, "task": result.run.task, "seed": result.run.seed}
        | measures(result.metrics)
        | extra
        for result, extra in zip(results, judged)
    ]


def by_itself(scale: Scale, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of a record, run by run; all arms of a seed before the next seed, so
    that what is there can be compared.
    """
    assert scale.alone is not None
    out = []
    for name, arm, task, seed in sorted(rows, key=lambda row: row[3]):
        print(f"{name}, seed {seed}", flush=True)
        numbers = scale.alone(
            scale.config, arm, sweep.Run(name, seed, settings_of(scale.config, arm), task)
        )
        out.append({"arm": name, "task": task, "seed": seed} | numbers)
    return out


def measures(metrics: Mapping[str, Float[np.ndarray, "steps"]]) -> dict[str, float]:
    """What is kept of a run: `end` is the mean reward of its last tenth, `area` that of
    all its steps, and so is `mean_entropy`; `first_ratio_off` is its largest; the
    others are of the end. A step without a finite update has no entropy.

    >>> flat = {
    ...     name: np.ones(20) for name in ("kl", "entropy", "length", "first_ratio_off")
    ... }
    >>> found = measures(
    ...     {
    ...         "reward": np.arange(20.0),
    ...         "skipped": np.zeros(20),
    ...         "barren_steps": np.zeros(20),
    ...     }
    ...     | flat
    ... )
    >>> found["end"], found["area"], found["mean_entropy"], found["diverged"]
    (18.5, 9.5, 1.0, 0.0)
    """
    entropy = np.where(metrics["barren_steps"] > 0, np.nan, metrics["entropy"])
    tail = lambda x: x[-max(len(x) // TAIL, 1) :]
    out = {
        "end": float(np.mean(tail(metrics["reward"]))),
        "area": float(np.mean(metrics["reward"])),
    }
    out |= {name: float(np.mean(tail(metrics[name]))) for name in ("kl", "length")}
    out |= {"entropy": mean_of_known(tail(entropy)), "mean_entropy": mean_of_known(entropy)}
    out["first_ratio_off"] = float(np.max(metrics["first_ratio_off"]))
    return out | {"diverged": float(np.sum(metrics["skipped"]) > 0)}


def mean_of_known(numbers: Float[np.ndarray, "N"]) -> float:
    """The mean of those that are numbers; NaN where none is."""
    known = numbers[~np.isnan(numbers)]
    return float(np.mean(known)) if len(known) else float("nan")


def judgements(
    scale: Scale, runs: Sequence[sweep.Run], results: Sequence[sweep.Result]
) -> list[dict[str, float]]:
    """The judge's numbers of each trained policy, with noise that no step has seen, and
    prompts where the scale has such: means over as many batches as make `JUDGED`
    rollouts.
    """
    judge, unseen, far = scale.judge, scale.unseen or scale.prompts, 2**30
    assert judge is not None
    settings = dataclasses.replace(
        scale.config, **{k: x for k, x in runs[0].settings.items() if k not in sweep.SWEPT}
    )
    model = scale.load(settings).model

    def one(params, frozen, prompts, key):
        return judge(responses(settings, model, params, frozen, prompts, key))

    program, out = jax.jit(one), []
    for run, result in zip(runs, results):
        own, found = dataclasses.replace(settings, seed=run.seed, steps_per_call=1), []
        for number in range(-(-JUDGED // own.rows)):
            batch = unseen(run).call(own, far + number * own.rows)
            key = jax.random.fold_in(jax.random.key(run.seed), far + number)
            found.append(
                program(
                    result.state.params, result.state.frozen, jax.tree.map(jnp.asarray, batch), key
                )
            )
        out.append(
            {name: mean_of_known(np.array([float(x[name]) for x in found])) for name in found[0]}
        )
    return out


def conclude(question: Question, scale: Scale, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the runs: arms with intervals, claims with verdicts."""
    wanted = metrics(question)
    table = lambda arm, metric: scores(rows, scale.tasks, arm, metric)
    arms = {}
    for name in question.arms:
        own = [row for row in rows if row["arm"] == name]
        arms[name] = {"runs": len(own), "diverged": int(sum(row["diverged"] for row in own))}
        for metric in wanted:
            arms[name][metric] = {
                "mean": over_seeds(table(name, metric)),
                "iqm": bootstrap(table(name, metric), iqm),
            }
    claims = []
    for claim in question.claims:
        found = compared(rows, scale.tasks, claim)
        claims.append(
            claim._asdict()
            | {"difference": list(found[:3]), "p": found.p, "verdict": verdict(found)}
        )
    settings = {name: x for name, x in files.settings_of(scale.config).items() if name != "name"}
    return {
        "question": question.name,
        "scale": scale.name,
        "tasks": list(scale.tasks),
        "config": settings,
        "settings": {name: described(arm) for name, arm in question.arms.items()},
        "arms": arms,
        "claims": claims,
        "runs": rows,
    }


def compared(rows: Sequence[dict], tasks: Sequence[str], claim: Claim) -> Difference:
    """The better arm less the worse one. A run that diverged counts as the worst of
    both arms on its task, whatever it has come to: a policy that no longer moves is
    near to its reference, and no success.
    """
    metric, sign = claim.metric.lstrip("-"), -1 if claim.metric.startswith("-") else 1
    arms = (claim.better, claim.worse)
    values = np.stack(
        [sign * scores(rows, tasks, arm, metric) for arm in arms]
    )  # [arms, tasks, seeds]
    gone = np.stack([scores(rows, tasks, arm, "diverged") for arm in arms]) > 0
    worst = np.min(np.where(np.isnan(values), np.inf, values), axis=(0, 2), keepdims=True)
    return difference(*np.where(gone, np.where(np.isinf(worst), np.nan, worst), values))


def scores(
    rows: Sequence[dict], tasks: Sequence[str], arm: str, metric: str
) -> Float[np.ndarray, "tasks seeds"]:
    """A metric of an arm's runs."""
    of = lambda task: [row[metric] for row in rows if row["arm"] == arm and row["task"] == task]
    # NaN where a record has null
    return np.array([of(task) for task in tasks], np.float64)


def verdict(found: Difference) -> str:
    """In words: the claim is that the difference is above 0."""
    return {1: "agrees", -1: "disagrees", 0: "not decided"}[found.decided]


def described(arm: Arm) -> dict[str, Any]:
    """An arm as a record keeps it; functions by their names."""
    changes = {name: fn.__name__ for name, fn in (("parts", arm.parts), ("model", arm.model)) if fn}
    plain = lambda x: [plain(y) for y in x] if isinstance(x, tuple) else x
    return {name: plain(x) for name, x in arm.settings.items()} | changes


def show(question: Question, record: dict[str, Any]) -> None:
    """Print the arms and the verdicts."""
    shown = metrics(question)
    few = (
        len({row["seed"] for row in record["runs"]}) < FEW
    )  # a bootstrap of so few is far too narrow
    which, title = ("mean", "mean") if few else ("iqm", "interquartile mean")
    cells = [
        [
            name,
            str(arm["runs"]),
            str(arm["diverged"]),
            *("{:.3f} [{:.3f}, {:.3f}]".format(*arm[x][which]) for x in shown),
        ]
        for name, arm in record["arms"].items()
    ]
    log.table(
        f"{question.name}: {title} [95 % interval]", ["arm", "runs", "diverged", *shown], cells
    )
    for claim in record["claims"]:
        value, low, high = claim["difference"]
        p = "" if np.isnan(claim["p"]) else f", p {claim['p']:.3f}"
        print(
            f"{claim['says']}: {claim['verdict']} ({claim['metric']} {value:+.3f}, 95 % [{low:+.3f}, {high:+.3f}]{p})"
        )
