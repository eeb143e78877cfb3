"""Final numbers of runs, with 95 % intervals: on test examples, on validation prompts,
and over the last training steps.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxppo.ablation import statistics
from jaxppo.commands.report import records
from jaxppo.commands.report.records import Group, Run
from jaxppo.errors import UserError
from jaxppo.run import figures
from jaxppo.tasks import metrics

LAST = 10  # training steps at the end that are averaged
STARTS = {"supervised": "test, supervised", "start": "test, start"}  # before the policy stage
GAIN, AFTER = "test, gain", "test, policy"
# On what a number was measured, in the order of the table.
RANK = {
    GAIN: 0,
    **dict.fromkeys(STARTS.values(), 0),
    AFTER: 0,
    "result.json": 0,
    "validation, last": 1,
    "training": 2,
}
CSV_HEADER = ("group", "run", "number", "on", "unit", "value", "low", "high", "p", "interval over")


class Outcome(NamedTuple):
    """A final number and its 95 % interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    over: str = ""  # what the interval is over
    p: float = math.nan  # of a difference between groups


Key = tuple[str, str]  # (name, on what it was measured)
Outcomes = dict[Key, Outcome]


def of_run(run: Run) -> Outcomes:
    """The final numbers of a run."""
    found, score_repeats = _on_test(run), figures.score_repeats(run)
    for row in run.rows:  # later rows overwrite earlier ones
        for name, x in row.items():
            if name.startswith("validation_") and not (
                name == "validation_score" and score_repeats
            ):
                found[name.removeprefix("validation_"), "validation, last"] = Outcome(x)
    for name in figures.training_keys([run]):
        if last := [row[name] for row in run.rows[-LAST:] if name in row]:
            found[name, "training"] = Outcome(sum(last) / len(last))
    return found


def _numbers(x: Any) -> dict[str, float]:
    items = x.items() if isinstance(x, dict) else ()
    return {k: records.to_float(v) for k, v in items if isinstance(v, int | float)}


def _on_test(run: Run) -> Outcomes:
    """The numbers of result.json. A task has them before and after training; a script
    writes its own, with standard errors as <name>_se.
    """
    start = "start" if "start" in run.result else "supervised"
    before, after = _numbers(run.result.get(start)), _numbers(run.result.get("policy"))
    found: Outcomes = {}
    if not after:
        flat = _numbers(run.result)
        for name, x in flat.items():
            if name.endswith("_se") or name in ("seed", "test_rows", "best_step"):
                continue
            error = 1.96 * flat.get(f"{name}_se", math.nan)
            over = "its standard error" if f"{name}_se" in flat else ""
            found[name, "result.json"] = Outcome(x, x - error, x + error, over)
        return found
    gains = run.result.get("gain")
    for name in (name for name in after if name != "score"):
        if name in before:
            found[name, STARTS[start]] = _with_interval(run, name, start, before[name])
        found[name, AFTER] = _with_interval(run, name, "policy", after[name])
        gain = gains.get(name) if isinstance(gains, dict) else None
        if isinstance(gain, list) and [type(x) in (int, float) for x in gain] == [True] * 3:
            over = f"{run.result.get('test_rows', '?')} test examples"
            found[name, GAIN] = Outcome(*map(records.to_float, gain), over=over)
    return found


def _with_interval(run: Run, name: str, stage: str, value: float) -> Outcome:
    """A metric with its bootstrap interval, if the stored responses give its value."""
    pairs = [(row.get(stage), row.get("reference")) for row in run.samples]
    texts = [(x, y) for x, y in pairs if isinstance(x, str) and isinstance(y, str)]
    if name not in metrics.METRICS or not texts or len(texts) < len(pairs):
        return Outcome(value)
    responses, references = zip(*texts)
    try:
        found, low, high = metrics.interval(metrics.METRICS[name], responses, references, seed=0)
    except UserError:  # the metric's package is not installed
        return Outcome(value)
    if not math.isclose(found, value, rel_tol=1e-6, abs_tol=1e-9):
        return Outcome(value)
    return Outcome(value, low, high, f"{len(run.samples)} test examples")


def of_group(group: Group) -> Outcomes:
    """Means over a group's seeds, with Student's t; a single run's own numbers."""
    each = [of_run(run) for run in group.runs]
    if len(each) == 1:
        return each[0]
    found = {}
    for key in dict.fromkeys(key for outcomes in each for key in outcomes):
        values = [outcomes[key].value for outcomes in each if key in outcomes]
        finite = all(map(math.isfinite, values))
        mean, low, high = statistics.mean_interval(values) if finite else (math.nan,) * 3
        some = f" of {len(each)}" * (len(values) < len(each))
        found[key] = Outcome(mean, low, high, f"{len(values)}{some} seeds")
    return found


def differences(groups: Sequence[Group]) -> list[tuple[Group, Outcomes]]:
    """Each later group minus the first, paired by seed. A diverged run makes its
    difference non-finite; it is not dropped. Groups that share fewer than two seeds
    with the first, or have a seed twice, are left out.
    """
    by_seed = lambda group: {run.settings.get("seed", 0): of_run(run) for run in group.runs}
    found, first = [], by_seed(groups[0]) if groups else {}
    for group in groups[1:]:
        own = by_seed(group)
        seeds = [seed for seed in first if seed in own]
        repeated = len(first) < len(groups[0].runs) or len(own) < len(group.runs)
        if len(seeds) < 2 or repeated:
            continue
        runs = [run for run in group.runs if run.settings.get("seed", 0) in seeds]
        in_both = lambda key, own=own, seeds=seeds: all(
            key in outcomes[seed] for outcomes in (first, own) for seed in seeds
        )
        values = lambda outcomes, key, seeds=seeds: [outcomes[seed][key].value for seed in seeds]
        paired = {
            key: _difference(values(own, key), values(first, key))
            for key in filter(in_both, first[seeds[0]])
        }
        found.append((Group(f"{group.label} minus {groups[0].label}", runs), paired))
    return found


def _difference(one: list[float], other: list[float]) -> Outcome:
    over = f"{len(one)} paired seeds"
    if not all(map(math.isfinite, one + other)):
        return Outcome(math.nan, over=over)
    found = statistics.paired_difference(np.array([one]), np.array([other]))
    return Outcome(found.mean, found.low, found.high, over, found.p)


def _ordered(outcomes: Sequence[Outcomes]) -> list[Key]:
    """Test, then validation, then training; numbers of one name stay together."""
    keys = dict.fromkeys(key for found in outcomes for key in found)
    names = list(dict.fromkeys(name for name, _ in keys))
    return sorted(keys, key=lambda key: (RANK[key[1]], names.index(key[0])))


def table(
    groups: Sequence[Group], outcomes: Sequence[Outcomes]
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) for readers: one row for each number, one column for each group.
    Training numbers that are 0 in every group are left out.
    """
    rows = []
    for name, on in _ordered(outcomes):
        found = [each.get((name, on)) for each in outcomes]
        if on == "training" and all(x is None or x.value == 0 for x in found):
            continue
        unit = figures.unit(name, training=on == "training")
        rows.append([name[:60] + f" ({unit})" * bool(unit), on, *map(shown, found)])
    seeds = lambda group: f" ({len(group.runs)} seeds)" * (len(group.runs) > 1)
    return ["number", "on", *(group.label + seeds(group) for group in groups)], rows


def shown(x: Outcome | None) -> str:
    """A value with its interval, and the number of seeds if some lack it.

    >>> shown(Outcome(0.51234, 0.25, 0.75, "3 seeds")), shown(None)
    ('0.512 [0.25, 0.75]', '–')
    >>> shown(Outcome(2.0, over="1 of 3 seeds"))
    '2 (1 of 3 seeds)'
    """
    if x is None:
        return "–"
    brief = lambda x: f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    value = brief(x.value) if math.isfinite(x.value) else "not finite"
    interval = f" [{brief(x.low)}, {brief(x.high)}]" if math.isfinite(x.low) else ""
    p = f", p {x.p:.2g}" if math.isfinite(x.p) else ""
    return value + interval + p + f" ({x.over})" * (" of " in x.over)


def csv_rows(
    groups: Sequence[Group], outcomes: Sequence[Outcomes]
) -> list[list[str | float | None]]:
    """The rows of report.csv: every number of each group, run and difference."""
    each: list[tuple[str, str, Outcomes]] = []
    for group, found in zip(groups, outcomes):
        each += [(group.label, "", found)] * (len(group.runs) > 1)
        each += [(group.label, run.name, of_run(run)) for run in group.runs]
    each += [(pairs.label, "", found) for pairs, found in differences(groups)]
    finite = lambda x: x if math.isfinite(x) else None
    rows: list[list[str | float | None]] = []
    for label, run_name, found in each:
        for name, on in _ordered([found]):
            value, low, high, over, p = found[name, on]
            unit = figures.unit(name, training=on == "training")
            known = [value, *map(finite, (low, high, p)), over]
            rows.append([label, run_name, name, on, unit, *known])
    return rows
