"""Curves of groups of runs in one picture, for print and every eye: a panel for a
number, a line for a group, a band over seeds.

Colours are Okabe & Ito's (https://jfly.uni-koeln.de/color/); each group has a line
style and a marker of its own, too.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxppo.commands.report.records import Group, Run
from jaxppo.run.files import printable
from jaxppo.run.log import PANELS

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#000000",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#F0E442",
)  # the darkest four first

STYLES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (3, 5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS_MOST = 8
POINTS = 300  # of a line: more cannot be seen
WIDTH, HEIGHT = 7.2, 1.95  # inches of the text of a page, and of a row of panels

UNITS = {
    **{key: unit for key, _, unit in PANELS},
    "length": "tokens a response",
    "loss": "of the update",
    "accuracy": "share",
    "exact": "share of rows",
    "wer": "edits a word",
    "answer_exact": "share of rows",
    "answer_f1": "0 to 1",
    "entity_f1": "0 to 1",
    "bleu": "0 to 100",
    "chrf": "0 to 100",
    "rouge1": "0 to 1",
    "rouge2": "0 to 1",
    "rougeL": "0 to 1",
    "cer": "edits a letter",
    "distinct_1": "share",
    "distinct_2": "share",
    "repetition": "share",
    "sentiment": "-1 to 1",
}

IN_WORDS = (
    "length",
    # training counts tokens, a task's metric of that name words: they do not share a panel
)
TITLES = {key: title for key, title, _ in PANELS}

TRAINING = (
    "reward",
    "kl",
    "entropy",
    "length",
    "explained_variance",
    "clip_fraction",
    "accuracy",
    "loss",
    "tokens_per_second",
)


def unit(name: str, *, training: bool) -> str:
    """What a number is counted in; "" where nothing is known.

    >>> (
    ...     unit("length", training=True),
    ...     unit("length", training=False),
    ...     unit("mine", training=True),
    ... )
    ('tokens a response', 'words a response', '')
    """
    return "words a response" if name in IN_WORDS and not training else UNITS.get(name, "")


class Line(NamedTuple):
    """A group's curve: at each step the mean over the runs that have one, the lowest
    and the highest.
    """

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def moving(runs: Sequence[Run]) -> list[str]:
    """The numbers of training that are not 0 throughout."""
    values = lambda key: [row[key] for run in runs for row in run.rows if key in row]
    finite = lambda key: [x for x in values(key) if math.isfinite(x)]
    return [key for key in TRAINING if any(finite(key)) or (values(key) and not finite(key))]


def keys(runs: Sequence[Run]) -> list[str]:
    """The numbers that have a panel, as many as fit on a printed page: what is learned
    from, what is validated, and the rest.
    """
    training = moving(runs)
    found = [
        key
        for key in training
        if key in ("reward", "accuracy") or (key == "loss" and "reward" not in training)
    ]
    for key in dict.fromkeys(
        key for run in runs for row in run.rows for key in row if key.startswith("validation_")
    ):
        if key.removeprefix("validation_") not in training and not (
            key == "validation_score" and all(map(score_is_another, runs))
        ):
            found.append(key)
    found = found[: PANELS_MOST - 3]
    return [*found, *(key for key in training if key not in found)][:PANELS_MOST]


def score_is_another(run: Run) -> bool:
    """Whether the score of its evaluations is one of their other numbers, or that
    turned round (or there is none).
    """
    rows = [row for row in run.rows if "validation_score" in row]
    others = {key for row in rows for key in row if key.startswith("validation_")} - {
        "validation_score"
    }
    same = lambda key: all(
        abs(row.get(key, math.nan)) == abs(row["validation_score"]) for row in rows
    )
    return not rows or any(map(same, others))


def line(runs: Sequence[Run], key: str, *, window: int = 1) -> Line:
    """The curve of one number: each run smoothed over `window` steps first. What is not
    finite is left out of means.
    """
    found: dict[int, list[float]] = {}
    for run in runs:
        points = [(int(row["step"]), row[key]) for row in run.rows if key in row]
        values = [x for _, x in points]
        for place, (step, _) in enumerate(points):
            recent = [x for x in values[max(0, place + 1 - window) : place + 1] if math.isfinite(x)]
            if recent:
                found.setdefault(step, []).append(sum(recent) / len(recent))
    steps = sorted(found)
    if len(steps) > POINTS:
        steps = [*steps[:: -(-len(steps) // POINTS)], steps[-1]]
    at = [found[step] for step in steps]
    return Line(steps, [sum(x) / len(x) for x in at], [min(x) for x in at], [max(x) for x in at])


def lost(runs: Sequence[Run], key: str) -> list[int]:
    """The steps at which a number is not finite, or an update was skipped because
    something in it was not.
    """
    sick = lambda row: not math.isfinite(row.get(key, 0.0)) or row.get("skipped", 0.0) > 0
    return sorted({int(row["step"]) for run in runs for row in run.rows if sick(row)})


def smoothing(groups: Sequence[Group]) -> int:
    """Steps that are averaged: a twentieth of the longest run."""
    return max(1, max(len(run.rows) for group in groups for run in group.runs) // 20)


def curves(groups: Sequence[Group]) -> str:
    """The picture as the text of an SVG. Text of a run is drawn, and is nothing else
    than its shapes there.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = keys([run for group in groups for run in group.runs])
    look: dict[Any, Any] = {
        "svg.fonttype": "path",
        "svg.hashsalt": "jaxppo",
        "text.parse_math": False,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "lines.linewidth": 1.6,
        "axes.unicode_minus": False,
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(look):
        rows = max(1, -(-len(drawn) // 2))
        legend = 0.2 * (2 + len(groups) // 2)  # inches
        figure, axes = plt.subplots(
            rows, 2, figsize=(WIDTH, rows * HEIGHT + legend), squeeze=False, layout="constrained"
        )
        for axis, key in zip(axes.flat, drawn, strict=False):
            _panel(axis, key, groups)
        for axis in list(axes.flat)[len(drawn) :]:
            axis.set_visible(False)
        _legend(figure, groups)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return out.getvalue()


def _style(number: int) -> dict[str, Any]:
    # a ninth group has the first's colour with another line
    turn = number + number // len(COLOURS)
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[turn % len(STYLES)]}


def _panel(axis: Any, key: str, groups: Sequence[Group]) -> None:
    """One number of all groups. Of validation a marker is drawn for each evaluation, of
    training some, to tell lines apart.
    """
    plain = key.removeprefix("validation_")
    for number, group in enumerate(groups):
        if key == "explained_variance" and key not in moving(
            group.runs
        ):  # of a group without a critic it is 0
            continue
        look, marker = _style(number), MARKERS[number % len(MARKERS)]
        if key == plain:
            found = line(group.runs, key, window=smoothing(groups))
            every = max(1, len(found.steps) // 5)
            axis.plot(
                found.steps,
                found.mean,
                marker=marker,
                markersize=3.5,
                markevery=(every // 2, every),
                **look,
            )
            if len(group.runs) > 1:
                axis.fill_between(
                    found.steps, found.low, found.high, color=look["color"], alpha=0.2, linewidth=0
                )
            elif len(groups) == 1:
                raw = line(group.runs, key)
                axis.plot(raw.steps, raw.mean, color=look["color"], alpha=0.3, linewidth=0.7)
        held_out = line(group.runs, f"validation_{plain}")
        if held_out.steps and (key != plain or key not in IN_WORDS):
            bars = [
                [m - x for m, x in zip(held_out.mean, held_out.low)],
                [x - m for m, x in zip(held_out.mean, held_out.high)],
            ]
            style = look | {"linestyle": look["linestyle"] if key != plain else "none"}
            axis.errorbar(
                held_out.steps,
                held_out.mean,
                yerr=bars if len(group.runs) > 1 else None,
                marker=marker,
                markersize=5,
                markerfacecolor="white",
                capsize=2,
                elinewidth=1,
                **style,
            )
        if steps := lost(group.runs, key):
            axis.plot(
                steps,
                [0.04] * len(steps),
                "x",
                transform=axis.get_xaxis_transform(),
                color=look["color"],
            )
    title = TITLES.get(plain, plain.replace("_", " "))
    axis.set_title(drawable(title + ", validation" * (key != plain)), loc="left")
    axis.set_ylabel(unit(plain, training=key == plain))
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.margins(x=0.02)


def _legend(figure: Any, groups: Sequence[Group]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Any] = []
    for number, group in enumerate(groups):
        label = drawable(group.label) + f" ({len(group.runs)} seeds)" * (len(group.runs) > 1)
        entries.append(
            Line2D(
                [],
                [],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                label=label,
                **_style(number),
            )
        )
    if any(len(group.runs) > 1 for group in groups):
        entries.append(Patch(color="#777777", alpha=0.3, label="lowest to highest seed"))
    rows = [row for group in groups for run in group.runs for row in run.rows]
    mark: dict[str, Any] = {"color": "#777777", "linestyle": "none"}
    if any(key.startswith("validation_") for row in rows for key in row):
        entries.append(
            Line2D([], [], marker="o", markerfacecolor="white", label="validation prompts", **mark)
        )
    if any(lost(group.runs, key) for group in groups for key in keys(group.runs)):
        entries.append(Line2D([], [], marker="x", label="not finite, or an update skipped", **mark))
    figure.legend(handles=entries, loc="outside upper center", ncols=2, frameon=False, fontsize=9)


def drawable(text: str) -> str:
    """What the font has of a text, the rest as its codes.

    >>> drawable("a-1 漢")
    'a-1 \\\\u6f22'
    """
    return printable(text).encode("latin-1", "backslashreplace").decode("latin-1")[:48]
