"""Plot how policies learn tasks and games, from records.

Question   How fast, how far, and how far from the start?
Command    python experiments/curves.py --out docs/tasks.png
               experiments/results/{spelling,sums,sentiment_label,reverse_text}/*.json
               experiments/results/{countdown,entities,summarisation,question_answering}/*.json
               experiments/results/{dialogue,speech}/*.json
           python experiments/curves.py experiments/results/episodes/*.json --out docs/episodes.png
Reads      Records of tasks and of `experiments/episodes.py`: a panel for each game, and
           for each task and method, with the reward of training: the mean of its seeds and a band
           from the lowest to the highest, each a moving average over five steps, or a fiftieth of
           all. Tasks have the score of validations, too, a line for each seed, and below the KL to
           the start of the policy stage.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxppo import cli
from jaxppo.errors import UserError

STEPS = 5  # of the moving average, at least, if a run has so many
COLUMNS = 4


@dataclass(frozen=True)
class Curves:
    records: tyro.conf.Positional[tuple[Path, ...]]
    """records (.json)"""
    out: Path = Path("curves.png")
    traceback: bool = False


def smooth(curve: list[float], steps: int) -> Float[np.ndarray, "N"]:
    """The mean of each so many steps in a row."""
    return np.convolve(curve, np.ones(steps) / steps, mode="valid")


def draw(axis: Axes, curves: list[list[float]], color: str, label: str) -> None:
    """Draw the mean over seeds, and a band from the lowest to the highest."""
    shortest = min(map(len, curves))
    window = min(max(STEPS, shortest // 50), shortest)
    smoothed = np.stack([smooth(curve[:shortest], window) for curve in curves])
    steps = window + np.arange(smoothed.shape[1])
    axis.fill_between(steps, smoothed.min(0), smoothed.max(0), color=color, alpha=0.3)
    axis.plot(steps, smoothed.mean(0), color=color, label=label)
    axis.grid(alpha=0.3)


def panel(axes: Sequence[Axes], found: list[dict]) -> None:
    """Draw what a task's or game's records have: a game on one axis, a task on two."""
    upper = axes[0]
    if "environment" in found[0]:
        draw(upper, [x["curve"] for x in found], "C0", "training")
        script = np.mean([x["script"] for x in found])
        upper.axhline(script, color="k", linestyle="--", linewidth=1, label="scripted play")
        upper.set(ylabel="score of episodes")
        return
    draw(upper, [x["curve"]["reward"] for x in found], "C0", "reward")
    for number, record in enumerate(found):
        label = "validation" if number == 0 else None
        upper.plot(
            *zip(*record["curve"]["validation"]), "C1.-", alpha=0.5, linewidth=0.8, label=label
        )
    draw(axes[1], [x["curve"]["kl"] for x in found], "C2", "KL, nats a response")


def main(options: Curves) -> None:
    groups: dict[str, list[dict]] = {}
    for path in options.records:
        record = json.loads(path.read_text())
        if "environment" in record:
            names = [record["environment"], *record["game"], record["config"]["model"]]
        else:
            config = record["config"]
            names = [record["task"], config["model"], config["advantage"]]
            names.append("" if "supervised" in record else "alone")
        groups.setdefault(" ".join(filter(None, names)), []).append(record)
    if not groups:
        raise UserError("no records; give at least one")
    height = 1 + any("environment" not in found[0] for found in groups.values())
    wide = min(COLUMNS, len(groups))
    deep = -(-len(groups) // wide) * height  # rows of axes
    figure = Figure(figsize=(4 * wide, 2.8 * deep), layout="constrained")
    axes = figure.subplots(deep, wide, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (name, found) in enumerate(groups.items()):
        row, column = number // wide * height, number % wide
        own = axes[row : row + height, column]
        own = own[: 1 + ("environment" not in found[0])]
        panel(own, found)
        own[0].set_title(f"{name}, {len(found)} seed" + "s" * (len(found) > 1), fontsize=10)
        for axis in own:
            axis.set_axis_on()
            axis.set(xlabel="step")
            axis.legend(loc="best", fontsize=8)
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    cli.script(main, Curves)
