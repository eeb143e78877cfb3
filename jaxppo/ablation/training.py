"""Train the arms of a question in as few programs as possible, and measure them."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxppo.ablation import sweep
from jaxppo.ablation.question import (
    MEASURES,
    AblationConfig,
    Arm,
    Question,
    Scale,
    arm_settings,
    check_question,
    metric_names,
    resolve_arm,
)
from jaxppo.ablation.record import make_record, print_record
from jaxppo.config import NO_RESULTS
from jaxppo.models import copies
from jaxppo.rollout import sample_responses
from jaxppo.run import files
from jaxppo.run.policy import Policy
from jaxppo.run.settings import to_dict
from jaxppo.types import Parts

UNSEEN = 2**30  # a cursor that training never reaches
# other fields of a scale's settings: how many runs, and how they are shown
NOT_IN_KEY = NO_RESULTS | {"seed", "seeds", "at_once", "alone", "sweep", "tasks"}

Row = tuple[str, Arm, str, int]  # arm's name, arm, task, seed


def run_ablation(question: Question, scale: Scale, options: AblationConfig) -> dict[str, Any]:
    """Train every arm on every task and seed; print the table and the verdicts; return
    the record, which is also written to `options.results`. What each program found is
    kept in `options.runs`, so that `options.resume` can continue after a kill.

    Raises UserError for a claim about an unknown arm or metric, or settings that cannot
    run.
    """
    check_question(question, scale)
    question, scale, seeds = apply_options(question, scale, options)
    rows = [
        (name, arm, task, seed)
        for name, arm in question.arms.items()
        for task in scale.tasks
        for seed in range(arm.first_seed, arm.first_seed + seeds)
    ]
    name = f"{question.name}-{scale.name}{'-tiny' * options.tiny}"
    started = time.monotonic()
    if scale.alone:
        found = train_one_by_one(scale, rows)
        minutes = sum(row.pop("minutes") for row in found)
    else:
        groups = group_by_program(scale, rows, options.at_once or scale.at_once)
        found = train_groups(scale, groups, Path(options.runs, f"{name}.jsonl"), options.resume)
        minutes = (time.monotonic() - started) / 60
    order = list(question.arms)
    found.sort(
        key=lambda row: (order.index(row["arm"]), scale.tasks.index(row["task"]), row["seed"])
    )

    record = make_record(question, scale, found)
    record["about"] = {"versions": files.versions(), "minutes": round(minutes, 2)}
    print_record(question, record)
    if place := files.write_record(options.results, name, record):
        print(f"written: {place}")
    return record


def apply_options(
    question: Question, scale: Scale, options: AblationConfig
) -> tuple[Question, Scale, int]:
    """(question with resolved arms, scale with its final settings, number of seeds)."""
    seeds, steps = options.seeds or scale.seeds, options.steps or scale.config.steps
    arms = dict(question.arms)
    if options.tiny:
        seeds, steps = 2, 2
        for name, arm in arms.items():
            times = {key: x for key, x in arm.times.items() if key != "steps"}
            arms[name] = arm._replace(times=times)
    save_every = scale.config.save_every if scale.alone else steps
    config = dataclasses.replace(scale.config, steps=steps, save_every=save_every, tiny=False)
    arms = {name: resolve_arm(arm, config, name) for name, arm in arms.items()}
    question, scale = question._replace(arms=arms), scale._replace(config=config)
    if set(metric_names(question)) <= MEASURES:  # nothing asks for the judge
        scale = scale._replace(judge=None)
    return question, scale, seeds


def group_by_program(
    scale: Scale, rows: Sequence[Row], at_once: int
) -> list[tuple[Arm, list[sweep.Run]]]:
    """Group the runs by what can be one program, with at most `at_once` runs in each.
    The arm stands for its group: all have its `parts` and `model`.
    """
    groups: dict[tuple, tuple[Arm, list[sweep.Run]]] = {}
    for name, arm, task, seed in rows:
        settings = arm_settings(scale.config, arm) | dict(scale.of_task.get(task, {}))
        run = sweep.Run(name, seed, settings, task)
        groups.setdefault((id(arm.parts), id(arm.model)), (arm, []))[1].append(run)
    out = []
    for arm, runs in groups.values():
        for same in sweep.group_by_program(runs, scale.config):
            # Pieces of equal size if possible: one compiled program then serves all.
            pieces = -(-len(same) // at_once)
            size = -(-len(same) // pieces)
            out += [(arm, same[start : start + size]) for start in range(0, len(same), size)]
    return out


def train_groups(
    scale: Scale, groups: Sequence[tuple[Arm, list[sweep.Run]]], place: Path, resume: bool
) -> list[dict[str, Any]]:
    """Train each group, and keep its rows in the file `place`. `resume` takes the rows
    of runs with the same settings from there.
    """
    key = lambda arm, run: run_key(scale, arm, run)
    kept = {row["key"]: row for row in files.read_numbers(place)} if resume else {}
    known = [key(arm, run) in kept for arm, runs in groups for run in runs]
    if resume:
        print(f"{sum(known)} of {len(known)} runs are finished in {place}", flush=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    files.write_jsonl(place, list(kept.values()))  # without a half-written line
    found = []
    for arm, runs in groups:
        if left := [run for run in runs if key(arm, run) not in kept]:
            rows = train_group(scale, arm, left)
            new = {key(arm, run): row for run, row in zip(left, rows, strict=True)}
            kept |= {name: {"key": name} | row for name, row in new.items()}
            files.write_jsonl(place, list(kept.values()))
        found += [kept[key(arm, run)] for run in runs]
    return [{name: x for name, x in row.items() if name != "key"} for row in found]


def run_key(scale: Scale, arm: Arm, run: sweep.Run) -> str:
    """A hash of everything that decides what a run finds, but for the code."""
    settings = {name: x for name, x in to_dict(scale.config).items() if name not in NOT_IN_KEY}
    changed = [f and f.__qualname__ for f in (arm.parts, arm.model)]
    whole = [settings | dict(run.settings), run.arm, run.task, run.seed, changed, bool(scale.judge)]
    whole += [scale.rollouts] * (scale.rollouts != Scale._field_defaults["rollouts"])
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def train_group(scale: Scale, arm: Arm, runs: list[sweep.Run]) -> list[dict[str, Any]]:
    """Train one group in one program; returns a row of the record for each run."""

    def load(settings: Any) -> Policy:
        policy = scale.load(settings)
        return dataclasses.replace(policy, model=arm.model(policy.model)) if arm.model else policy

    def make_parts(settings: Any) -> Parts:
        parts = scale.make_parts(settings, scale.reward)
        return arm.parts(parts) if arm.parts else parts

    names = sorted({run.arm for run in runs})
    print(f"{len(runs)} runs at once: {', '.join(names)}", flush=True)
    results = sweep.run(scale.config, runs, load, make_parts, scale.prompts)
    judged = judge_policies(scale, results) if scale.judge else [{}] * len(results)
    return [
        {"arm": run.arm, "task": run.task, "seed": run.seed} | summarise(result.metrics) | extra
        for run, result, extra in zip(runs, results, judged, strict=True)
    ]


def train_one_by_one(scale: Scale, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Train each run by itself (`Scale.alone`); all arms of a seed before the next
    seed, so that an unfinished record can be compared.
    """
    assert scale.alone is not None
    out = []
    for name, arm, task, seed in sorted(rows, key=lambda row: row[3]):
        print(f"{name}, seed {seed}", flush=True)
        run = sweep.Run(name, seed, arm_settings(scale.config, arm), task)
        out.append({"arm": name, "task": task, "seed": seed} | scale.alone(scale.config, arm, run))
    return out


def summarise(metrics: Mapping[str, Float[np.ndarray, "steps"]]) -> dict[str, float]:
    """The MEASURES of a run, and `diverged`: whether it skipped an update.

    `end` is the mean reward of the last tenth of the steps; kl, length and entropy are
    of that tenth, too. `area` and `mean_entropy` are means over all steps. A step
    without a finite update has no entropy.

    >>> names = "kl entropy length first_ratio_off skipped barren_steps".split()
    >>> zeros = {name: np.zeros(20) for name in names}
    >>> found = summarise({"reward": np.arange(20.0)} | zeros)
    >>> found["end"], found["area"], found["diverged"]
    (18.5, 9.5, 0.0)
    """
    entropy = np.where(metrics["barren_steps"] > 0, np.nan, metrics["entropy"])
    tail = lambda x: x[-max(len(x) // 10, 1) :]
    return {
        "end": float(np.mean(tail(metrics["reward"]))),
        "area": float(np.mean(metrics["reward"])),
        "kl": float(np.mean(tail(metrics["kl"]))),
        "length": float(np.mean(tail(metrics["length"]))),
        "entropy": mean_without_nan(tail(entropy)),
        "mean_entropy": mean_without_nan(entropy),
        "first_ratio_off": float(np.max(metrics["first_ratio_off"])),
        "diverged": float(np.sum(metrics["skipped"]) > 0),
    }


def mean_without_nan(values: Float[np.ndarray, "N"]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(np.mean(known)) if len(known) else float("nan")


def judge_policies(scale: Scale, results: Sequence[sweep.Result]) -> list[dict[str, float]]:
    """Measure each trained policy of one program with the scale's judge, on rollouts
    that training has not seen.
    """
    judge, prompts = scale.judge, scale.unseen or scale.prompts
    assert judge is not None
    shared = {k: x for k, x in results[0].run.settings.items() if k not in sweep.SWEPT}
    settings = dataclasses.replace(scale.config, **shared)
    model = scale.load(settings).model

    @jax.jit
    def measure(params, frozen, prompts, key):
        return judge(sample_responses(settings, model, params, frozen, prompts, key))

    out = []
    for run, _, state in results:
        config, found = dataclasses.replace(settings, seed=run.seed, steps_per_call=1), []
        state = copies.averaged(state)
        for number in range(-(-scale.rollouts // config.rows)):
            batch = prompts(run).batches(config, UNSEEN + number * config.rows)
            key = jax.random.fold_in(jax.random.key(run.seed), UNSEEN + number)
            batch = jax.tree.map(jnp.asarray, batch)
            found.append(measure(state.params, state.frozen, batch, key))
        names = found[0]
        out.append(
            {name: mean_without_nan(np.array([float(x[name]) for x in found])) for name in names}
        )
    return out
