"""Training curves of groups of runs in one picture: a panel for each metric, a line for
each group, a band over its seeds.

The colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/). Groups also differ
in line style and marker, so that they can be told apart in black and white.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

from jaxppo.run.files import printable, read_metrics

# The four darkest colours come first.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
STYLES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (3, 5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_PANELS = 8
MAX_POINTS = 300  # of a line
WIDTH, HEIGHT = 7.2, 1.95  # inches: of the text on a page, of a row of panels

TITLES = {
    "kl": "KL to the reference",
    "teacher_kl": "KL to the teacher",
    "clip_fraction": "clipped tokens",
    "explained_variance": "explained variance of the critic",
    "tokens_per_second": "speed",
}
UNITS = {
    "reward": "score a response",
    "kl": "nats a response",
    "teacher_kl": "nats a response",
    "entropy": "nats a token",
    "clip_fraction": "share",
    "explained_variance": "share",
    "tokens_per_second": "sampled tokens / s",
    "length": "tokens a response",
    "loss": "of the update",
    "wer": "edits a word",
    "cer": "edits a letter",
    "sentiment": "-1 to 1",
}
UNITS |= dict.fromkeys(("accuracy", "distinct_1", "distinct_2", "repetition"), "share")
UNITS |= dict.fromkeys(("exact", "answer_exact"), "share of rows")
UNITS |= dict.fromkeys(("answer_f1", "entity_f1", "rouge1", "rouge2", "rougeL"), "0 to 1")
UNITS |= dict.fromkeys(("bleu", "chrf"), "0 to 100")
UNITS |= {"avg": "score a response"} | dict.fromkeys(("pass", "maj"), "share of prompts")

TRAINING = (
    "reward",
    "kl",
    "teacher_kl",
    "entropy",
    "length",
    "explained_variance",
    "clip_fraction",
    "accuracy",
    "loss",
    "tokens_per_second",
)

RC_PARAMS: dict[Any, Any] = {
    "svg.fonttype": "path",  # text becomes shapes: nothing in it can act
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


def unit(name: str, *, training: bool) -> str:
    """The unit of a metric, or "" if it is unknown. Training counts the tokens of a
    response; the task metric `length` counts its words.

    >>> unit("length", training=True), unit("length", training=False)
    ('tokens a response', 'words a response')
    """
    if name == "length" and not training:
        return "words a response"
    return UNITS.get(name.partition("@")[0], "")  # pass@4, ...


class Run(Protocol):
    """What is drawn of a run."""

    @property
    def rows(self) -> Sequence[dict[str, float]]: ...


class Group(Protocol):
    """Runs that form one line."""

    @property
    def label(self) -> str: ...

    @property
    def runs(self) -> Sequence[Run]: ...


class Line(NamedTuple):
    """Over the runs of a group: the mean, lowest and highest value at each step."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def score_keys(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """The metrics of named scores, in the order of the rows.

    >>> score_keys([{"reward": 1.0, "score_right": 0.5}, {"score_short": 0.0}])
    ['score_right', 'score_short']
    """
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith("score_")))


def training_keys(runs: Sequence[Run]) -> list[str]:
    """The training metrics of a report; named scores follow the reward."""
    reward, *others = TRAINING
    return [reward, *score_keys(row for run in runs for row in run.rows), *others]


def nonzero(runs: Sequence[Run]) -> list[str]:
    """The training metrics that are not 0 at every step."""
    values = lambda key: [row[key] for run in runs for row in run.rows if key in row]
    finite = lambda key: [x for x in values(key) if math.isfinite(x)]
    keys = training_keys(runs)
    return [key for key in keys if any(finite(key)) or (values(key) and not finite(key))]


def panels(runs: Sequence[Run]) -> list[str]:
    """The metrics to draw, at most `MAX_PANELS`: the objective, validation, the rest.
    A validation metric shares the panel of its training metric.
    """
    training = nonzero(runs)
    objectives = ["reward", "accuracy", *(["loss"] if "reward" not in training else [])]
    found = [key for key in training if key in objectives or key.startswith("score_")]
    repeats = all(map(score_repeats, runs))
    for key in dict.fromkeys(key for run in runs for row in run.rows for key in row):
        name = key.removeprefix("validation_")
        if name != key and name not in training and not (name == "score" and repeats):
            found.append(key)
    found = found[: MAX_PANELS - 3]
    return [*found, *(key for key in training if key not in found)][:MAX_PANELS]


def score_repeats(run: Run) -> bool:
    """Whether `validation_score` only repeats another validation metric, perhaps with
    the opposite sign.
    """
    rows = [row for row in run.rows if "validation_score" in row]
    others = {key for row in rows for key in row if key.startswith("validation_")}
    same = lambda key: all(
        abs(row.get(key, math.nan)) == abs(row["validation_score"]) for row in rows
    )
    return not rows or any(map(same, others - {"validation_score"}))


def line(runs: Sequence[Run], key: str, *, window: int = 1) -> Line:
    """The curve of a metric: each run is averaged over the last `window` steps, then
    the runs are combined. Non-finite values are left out.
    """
    found: dict[int, list[float]] = {}
    for run in runs:
        points = [(int(row["step"]), row[key]) for row in run.rows if key in row]
        for place, (step, _) in enumerate(points):
            recent = [x for _, x in points[max(0, place + 1 - window) : place + 1]]
            if finite := list(filter(math.isfinite, recent)):
                found.setdefault(step, []).append(sum(finite) / len(finite))
    steps = sorted(found)
    if len(steps) > MAX_POINTS:
        steps = [*steps[:: -(-len(steps) // MAX_POINTS)], steps[-1]]
    at = [found[step] for step in steps]
    return Line(steps, [sum(x) / len(x) for x in at], [min(x) for x in at], [max(x) for x in at])


def bad_steps(runs: Sequence[Run], key: str) -> list[int]:
    """The steps at which a metric is not finite or an update was skipped."""
    bad = lambda row: not math.isfinite(row.get(key, 0.0)) or row.get("skipped", 0.0) > 0
    return sorted({int(row["step"]) for run in runs for row in run.rows if bad(row)})


def smoothing(groups: Sequence[Group]) -> int:
    """The number of steps to average: a twentieth of the longest run."""
    return max(1, max(len(run.rows) for group in groups for run in group.runs) // 20)


def draw(groups: Sequence[Group]) -> str:
    """Draw the curves of all groups. Returns the text of an SVG."""
    out = io.StringIO()
    _save(groups, out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def plot_curves(folder: Path) -> Path:
    """Draw curves.png of a run from its metrics.jsonl."""
    run: Any = SimpleNamespace(rows=read_metrics(folder))
    group: Any = SimpleNamespace(label=folder.name, runs=[run])
    _save([group], folder / "curves.png", dpi=120)
    return folder / "curves.png"


def _save(groups: Sequence[Group], place: Any, **options: Any) -> None:
    import matplotlib  # heavy; `jaxppo report --help` does not need it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = panels([run for group in groups for run in group.runs])
    rows = max(1, -(-len(drawn) // 2))
    legend = 0.2 * (2 + len(groups) // 2)  # inches
    with matplotlib.rc_context(RC_PARAMS):
        size = (WIDTH, rows * HEIGHT + legend)
        figure, axes = plt.subplots(rows, 2, figsize=size, squeeze=False, layout="constrained")
        for axis, key in zip(axes.flat, drawn):
            _draw_panel(axis, key, groups)
        for axis in list(axes.flat)[len(drawn) :]:
            axis.set_visible(False)
        _draw_legend(figure, groups)
        figure.savefig(place, **options)
        plt.close(figure)


def line_style(number: int) -> dict[str, Any]:
    """Colour and line style of a group; 16 groups can be told apart."""
    turn = number + number // len(COLOURS)
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[turn % len(STYLES)]}


def _draw_panel(axis: Any, key: str, groups: Sequence[Group]) -> None:
    """Draw one metric of all groups."""
    name = key.removeprefix("validation_")
    for number, group in enumerate(groups):
        if key == "explained_variance" and key not in nonzero(group.runs):
            continue  # without a critic it is 0
        style, marker = line_style(number), MARKERS[number % len(MARKERS)]
        if key == name:
            _draw_training(axis, key, group, groups, style, marker)
        # Words do not belong in a panel of tokens.
        if key != name or key != "length":
            line_or_none = "none" if key == name else style["linestyle"]
            _draw_validation(axis, name, group, style | {"linestyle": line_or_none}, marker)
        if steps := bad_steps(group.runs, key):
            mark = {"transform": axis.get_xaxis_transform(), "color": style["color"]}
            axis.plot(steps, [0.04] * len(steps), "x", **mark)
    title = TITLES.get(name, name.replace("_", " "))
    axis.set_title(drawable(title + ", validation" * (key != name)), loc="left")
    axis.set_ylabel(unit(name, training=key == name))
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.margins(x=0.02)


def _draw_training(
    axis: Any, key: str, group: Group, groups: Sequence[Group], style: dict, marker: str
) -> None:
    """Draw the smoothed line, with a few markers, and the band over the seeds."""
    found = line(group.runs, key, window=smoothing(groups))
    every = max(1, len(found.steps) // 5)
    few = {"marker": marker, "markersize": 3.5, "markevery": (every // 2, every)}
    axis.plot(found.steps, found.mean, **few, **style)
    light = {"color": style["color"], "alpha": 0.2}
    if len(group.runs) > 1:
        axis.fill_between(found.steps, found.low, found.high, linewidth=0, **light)
    elif len(groups) == 1:
        raw = line(group.runs, key)
        axis.plot(raw.steps, raw.mean, linewidth=0.7, **light | {"alpha": 0.3})


def _draw_validation(axis: Any, name: str, group: Group, style: dict, marker: str) -> None:
    """Draw a marker for each evaluation, with a bar over the seeds."""
    found = line(group.runs, f"validation_{name}")
    if not found.steps:
        return
    below = [m - x for m, x in zip(found.mean, found.low)]
    above = [x - m for m, x in zip(found.mean, found.high)]
    bars = [below, above] if len(group.runs) > 1 else None
    look = {"marker": marker, "markersize": 5, "markerfacecolor": "white"}
    axis.errorbar(found.steps, found.mean, yerr=bars, capsize=2, elinewidth=1, **look, **style)


def _draw_legend(figure: Any, groups: Sequence[Group]) -> None:
    from matplotlib.lines import Line2D  # see `draw`
    from matplotlib.patches import Patch

    entries: list[Any] = []
    for number, group in enumerate(groups):
        label = drawable(group.label) + f" ({len(group.runs)} seeds)" * (len(group.runs) > 1)
        look = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4, "label": label}
        entries.append(Line2D([], [], **look, **line_style(number)))
    if any(len(group.runs) > 1 for group in groups):
        entries.append(Patch(color="#777777", alpha=0.3, label="lowest to highest seed"))
    rows = [row for group in groups for run in group.runs for row in run.rows]
    mark: dict[str, Any] = {"color": "#777777", "linestyle": "none"}
    if any(key.startswith("validation_") for row in rows for key in row):
        hollow = {"marker": "o", "markerfacecolor": "white"}
        entries.append(Line2D([], [], label="validation prompts", **hollow, **mark))
    if any(bad_steps(group.runs, key) for group in groups for key in panels(group.runs)):
        entries.append(Line2D([], [], marker="x", label="not finite, or an update skipped", **mark))
    figure.legend(handles=entries, loc="outside upper center", ncols=2, frameon=False, fontsize=9)


def drawable(text: str) -> str:
    """The text in characters that the font has; others as escape codes.

    >>> drawable("a-1 漢")
    'a-1 \\\\u6f22'
    """
    return printable(text).encode("latin-1", "backslashreplace").decode("latin-1")[:48]
