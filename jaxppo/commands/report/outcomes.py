"""What runs have come to, in numbers: on test examples, on validation prompts, in the
last steps of training, with intervals.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxppo.ablation import statistics
from jaxppo.commands.report import figures, records
from jaxppo.commands.report.records import Group, Run
from jaxppo.errors import UserError
from jaxppo.tasks import metrics

LAST = 10  # steps of training at the end that are averaged
GAIN, BEFORE, AFTER = "test, gain", "test, supervised", "test, policy"


class End(NamedTuple):
    """A number that a run or a group has come to, and where it lies with 95 %: nan
    where nothing tells.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    over: str = ""  # what the interval is over
    p: float = math.nan  # of a difference between groups


Key = tuple[str, str]  # (what, when or on what)


def run_ends(run: Run) -> dict[Key, End]:
    """What a run has come to: on test examples, on validation prompts at last, in the
    last steps of training.
    """
    found, twice = held_out(run), figures.score_is_another(run)
    for row in run.rows:  # the last that has it
        for name, x in row.items():
            if name.startswith("validation_") and not (name == "validation_score" and twice):
                found[name.removeprefix("validation_"), "validation, last"] = End(x)
    for name in figures.TRAINING:
        if last := [row[name] for row in run.rows[-LAST:] if name in row]:
            found[name, "training"] = End(sum(last) / len(last))
    return found


def held_out(run: Run) -> dict[Key, End]:
    """The numbers of result.json: of a task's whole way before and after, or those that
    a script of its own has written.
    """
    numbers = lambda x: (
        {k: records.number(v) for k, v in x.items() if isinstance(v, int | float)}
        if isinstance(x, dict)
        else {}
    )
    before, after, gains = (
        numbers(run.result.get("supervised")),
        numbers(run.result.get("policy")),
        run.result.get("gain"),
    )
    if not after:
        flat = numbers(run.result)
        error = lambda name: 1.96 * flat.get(f"{name}_se", math.nan)
        over = lambda name: "its standard error" if f"{name}_se" in flat else ""
        return {
            (name, "result.json"): End(x, x - error(name), x + error(name), over(name))
            for name, x in flat.items()
            if not name.endswith("_se") and name not in ("seed", "test_rows", "best_step")
        }
    found: dict[Key, End] = {}
    for name in (name for name in after if name != "score"):
        for when, stage, values in ((BEFORE, "supervised", before), (AFTER, "policy", after)):
            if name in values:
                found[name, when] = measured(run, name, stage, values[name])
        gain = gains.get(name) if isinstance(gains, dict) else None
        if (
            isinstance(gain, list)
            and len(gain) == 3
            and all(isinstance(x, int | float) for x in gain)
        ):
            rows = run.result.get("test_rows", "?")
            found[name, GAIN] = End(*map(records.number, gain), over=f"{rows} test examples")
    return found


def measured(run: Run, name: str, stage: str, value: float) -> End:
    """A metric with its interval over the test examples, where the responses are there
    and give the same value again.
    """
    pairs = [(row.get(stage), row.get("reference")) for row in run.samples]
    texts = [(x, y) for x, y in pairs if isinstance(x, str) and isinstance(y, str)]
    if name not in metrics.METRICS or not texts or len(texts) < len(pairs):
        return End(value)
    responses, references = zip(*texts, strict=True)
    try:
        again, low, high = metrics.interval(metrics.METRICS[name], responses, references, seed=0)
    except UserError:  # the metric's package is not installed
        return End(value)
    same = math.isclose(again, value, rel_tol=1e-6, abs_tol=1e-9)
    return End(value, low, high, f"{len(run.samples)} test examples") if same else End(value)


def group_ends(group: Group) -> dict[Key, End]:
    """The means of a group over its seeds, with Student's t; a single run's numbers as
    they are.
    """
    each = [run_ends(run) for run in group.runs]
    if len(each) == 1:
        return each[0]
    found = {}
    for key in dict.fromkeys(key for ends in each for key in ends):
        values = [ends[key].value for ends in each if key in ends]
        finite = all(map(math.isfinite, values))
        mean, low, high = statistics.mean_interval(values) if finite else (math.nan,) * 3
        found[key] = End(
            mean,
            low,
            high,
            f"{len(values)} of {len(each)} seeds"
            if len(values) < len(each)
            else f"{len(values)} seeds",
        )
    return found


def differences(groups: Sequence[Group]) -> list[tuple[Group, dict[Key, End]]]:
    """Each later group less the first one, run against run of the same seed
    (`statistics.difference`): where at least two seeds are in both, once each. A run
    that diverged makes a difference that is not finite; it is not dropped.
    """
    by_seed = lambda group: {run.settings.get("seed", 0): run_ends(run) for run in group.runs}
    found, first = [], by_seed(groups[0]) if groups else {}
    for group in groups[1:]:
        own = by_seed(group)
        seeds = [seed for seed in first if seed in own]
        if len(seeds) < 2 or len(first) < len(groups[0].runs) or len(own) < len(group.runs):
            continue
        both = [
            key
            for key in first[seeds[0]]
            if all(key in ends[seed] for ends in (first, own) for seed in seeds)
        ]
        paired = [run for run in group.runs if run.settings.get("seed", 0) in seeds]
        pairs = Group(f"{group.label} less {groups[0].label}", paired)
        values = lambda ends, key, seeds=seeds: [ends[seed][key].value for seed in seeds]
        found.append(
            (pairs, {key: _difference(values(own, key), values(first, key)) for key in both})
        )
    return found


def _difference(one: list[float], other: list[float]) -> End:
    over = f"{len(one)} seeds, in pairs"
    if not all(map(math.isfinite, one + other)):
        return End(math.nan, over=over)
    found = statistics.difference(np.array([one]), np.array([other]))
    return End(found.mean, found.low, found.high, over, found.p)


def in_order(ends: Sequence[dict[Key, End]]) -> list[Key]:
    """Test before validation before training; a gain beside what it is the gain of."""
    keys = dict.fromkeys(key for found in ends for key in found)
    place = {GAIN: 0, BEFORE: 0, AFTER: 0, "result.json": 0, "validation, last": 1, "training": 2}
    names = list(dict.fromkeys(name for name, _ in keys))
    return sorted(keys, key=lambda key: (place[key[1]], names.index(key[0])))


def table(
    groups: Sequence[Group], ends: Sequence[dict[Key, End]]
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) to be read: a line a number, a column a group or a difference of
    groups. Of training, what is 0 everywhere is left out.
    """
    rows = []
    for name, when in in_order(ends):
        if when == "training" and all(
            found.get((name, when), End(0.0)).value == 0 for found in ends
        ):
            continue
        unit = figures.unit(name, training=when == "training")
        rows.append(
            [
                name[:60] + f" ({unit})" * bool(unit),
                when,
                *(shown(found.get((name, when))) for found in ends),
            ]
        )
    seeds = lambda group: f" ({len(group.runs)} seeds)" * (len(group.runs) > 1)
    return ["number", "on", *(group.label + seeds(group) for group in groups)], rows


def shown(end: End | None) -> str:
    """A value with its interval, and how many seeds it is of where some have none.

    >>> (
    ...     shown(End(0.51234, 0.25, 0.75, "3 seeds")),
    ...     shown(End(2.0, over="1 of 3 seeds")),
    ...     shown(None),
    ... )
    ('0.512 [0.25, 0.75]', '2 (1 of 3 seeds)', '–')
    """
    if end is None:
        return "–"
    brief = lambda x: f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    value = brief(end.value) if math.isfinite(end.value) else "not finite"
    interval = f" [{brief(end.low)}, {brief(end.high)}]" if math.isfinite(end.low) else ""
    return (
        value
        + interval
        + f", p {end.p:.2g}" * math.isfinite(end.p)
        + f" ({end.over})" * (" of " in end.over)
    )


def as_lines(
    groups: Sequence[Group], ends: Sequence[dict[Key, End]]
) -> tuple[list[str], list[list[str | float | None]]]:
    """(header, rows) of report.csv: a line for each number of each group, of each run
    of it, and of each difference.
    """
    each: list[tuple[str, str, dict[Key, End]]] = []
    for group, found in zip(groups, ends, strict=True):
        each += [(group.label, "", found)] * (len(group.runs) > 1)
        each += [(group.label, run.name, run_ends(run)) for run in group.runs]
    each += [(pairs.label, "", found) for pairs, found in differences(groups)]
    known = lambda x: x if math.isfinite(x) else None
    rows: list[list[str | float | None]] = []
    for label, name, found in each:
        for what, when in in_order([found]):
            end, unit = found[what, when], figures.unit(what, training=when == "training")
            rows.append(
                [
                    label,
                    name,
                    what,
                    when,
                    unit,
                    end.value,
                    known(end.low),
                    known(end.high),
                    known(end.p),
                    end.over,
                ]
            )
    return [
        "group",
        "run",
        "number",
        "on",
        "unit",
        "value",
        "low",
        "high",
        "p",
        "interval over",
    ], rows
