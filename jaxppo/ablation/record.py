"""The record of an ablation: arms with intervals, claims with verdicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxppo.ablation.question import Arm, Claim, Question, Scale, metric_names
from jaxppo.ablation.statistics import (
    MIN_SEEDS_FOR_P,
    Difference,
    bootstrap,
    iqm,
    mean_over_seeds,
    paired_difference,
)
from jaxppo.run import files, log

VERDICTS = {1: "agrees", -1: "disagrees", 0: "not decided"}


def make_record(question: Question, scale: Scale, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the runs' rows: intervals for each arm, a verdict for each claim."""
    arms = {}
    for name in question.arms:
        own = [row for row in rows if row["arm"] == name]
        arms[name] = {"runs": len(own), "diverged": int(sum(row["diverged"] for row in own))}
        for metric in metric_names(question):
            table = score_table(rows, scale.tasks, name, metric)
            arms[name][metric] = {"mean": mean_over_seeds(table), "iqm": bootstrap(table, iqm)}
    claims = []
    for claim in question.claims:
        found = compare_arms(rows, scale.tasks, claim)
        claims.append(
            claim._asdict()
            | {"difference": list(found[:3]), "p": found.p, "verdict": VERDICTS[found.decided]}
        )
    settings = {
        name: x for name, x in files.portable_settings(scale.config).items() if name != "name"
    }
    of_task = {name: dict(scale.of_task[name]) for name in scale.tasks if name in scale.of_task}
    return {
        "question": question.name,
        "scale": scale.name,
        "tasks": list(scale.tasks),
        "config": settings,
        **({"of_task": of_task} if of_task else {}),
        "settings": {name: describe_arm(arm) for name, arm in question.arms.items()},
        "arms": arms,
        "claims": claims,
        "runs": rows,
    }


def compare_arms(rows: Sequence[dict], tasks: Sequence[str], claim: Claim) -> Difference:
    """The better arm minus the worse one.

    A run that diverged gets the worst value of both arms on its task: a policy that no
    longer moves stays close to its reference, which is no success.
    """
    metric, sign = claim.metric.lstrip("-"), -1 if claim.metric.startswith("-") else 1
    both = (claim.better, claim.worse)
    # [arms, tasks, seeds]
    values = np.stack([sign * score_table(rows, tasks, arm, metric) for arm in both])
    diverged = np.stack([score_table(rows, tasks, arm, "diverged") for arm in both]) > 0
    worst = np.min(np.where(np.isnan(values), np.inf, values), axis=(0, 2), keepdims=True)
    worst = np.where(np.isinf(worst), np.nan, worst)
    return paired_difference(*np.where(diverged, worst, values))


def score_table(
    rows: Sequence[dict], tasks: Sequence[str], arm: str, metric: str
) -> Float[np.ndarray, "tasks seeds"]:
    """A metric of an arm's runs; NaN where the record has null."""
    own = [row for row in rows if row["arm"] == arm]
    return np.array([[row[metric] for row in own if row["task"] == x] for x in tasks], np.float64)


def describe_arm(arm: Arm) -> dict[str, Any]:
    """An arm's settings as JSON values; functions by their names."""
    changes = {name: fn.__name__ for name, fn in (("parts", arm.parts), ("model", arm.model)) if fn}
    plain = lambda x: [plain(y) for y in x] if isinstance(x, tuple) else x
    return {name: plain(x) for name, x in arm.settings.items()} | changes


def print_record(question: Question, record: dict[str, Any]) -> None:
    """Print a table of the arms and the verdicts on the claims."""
    shown = metric_names(question)
    # A bootstrap over few seeds is far too narrow.
    few = len({row["seed"] for row in record["runs"]}) < MIN_SEEDS_FOR_P
    which, title = ("mean", "mean") if few else ("iqm", "interquartile mean")
    interval = lambda x: "{:.3f} [{:.3f}, {:.3f}]".format(*x)
    cells = [
        [name, str(arm["runs"]), str(arm["diverged"]), *(interval(arm[x][which]) for x in shown)]
        for name, arm in record["arms"].items()
    ]
    names = ["arm", "runs", "diverged", *shown]
    log.print_table(f"{question.name}: {title} [95 % interval]", names, cells)
    for claim in record["claims"]:
        value, low, high = claim["difference"]
        p = "" if np.isnan(claim["p"]) else f", p {claim['p']:.3f}"
        print(
            f"{claim['says']}: {claim['verdict']} ({claim['metric']} {value:+.3f}, "
            f"95 % [{low:+.3f}, {high:+.3f}]{p})"
        )
