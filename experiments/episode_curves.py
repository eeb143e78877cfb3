"""Plot how policies learn games of several turns, from records.

Question   How fast, and how near to good play?
Command    python experiments/episode_curves.py experiments/results/episodes/*.json
               --out docs/episodes.png
Reads      Records of `experiments/episodes.py`: a panel a game, the mean of its seeds and a band
           from the lowest to the highest, each a moving average over five steps.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float
from matplotlib.figure import Figure

from jaxppo import cli
from jaxppo.errors import UserError

STEPS = 5  # of the moving average


@dataclass(frozen=True)
class Curves:
    records: tyro.conf.Positional[tuple[Path, ...]]
    """records (.json)"""
    out: Path = Path("episodes.png")
    traceback: bool = False


def smooth(curve: list[float]) -> Float[np.ndarray, "N"]:
    """The mean of each `STEPS` steps in a row."""
    return np.convolve(curve, np.ones(STEPS) / STEPS, mode="valid")


def main(options: Curves) -> None:
    games: dict[str, list[dict]] = {}
    for path in options.records:
        record = json.loads(path.read_text())
        games.setdefault(" ".join([record["environment"], *record["game"]]), []).append(record)
    if not games:
        raise UserError("no records; give at least one")
    figure = Figure(figsize=(4 * len(games), 3.2), layout="constrained")
    for axis, (name, found) in zip(figure.subplots(1, len(games), squeeze=False)[0], games.items()):
        curves = np.stack([smooth(record["curve"]) for record in found])
        steps = STEPS + np.arange(curves.shape[1])
        axis.fill_between(steps, curves.min(0), curves.max(0), alpha=0.3)
        axis.plot(steps, curves.mean(0))
        script = np.mean([record["script"] for record in found])
        axis.axhline(script, color="k", linestyle="--", linewidth=1, label="scripted play")
        axis.set(title=f"{name}, {len(found)} seeds", xlabel="step", ylabel="score of episodes")
        axis.legend(loc="lower right", fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    cli.script(main, Curves)
