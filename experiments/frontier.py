"""Plot the frontier of the main job: the judge's sentiment against the KL to the reference.

Question   How much sentiment does each nat of KL buy, over training steps and KL coefficients?
Command    python experiments/frontier.py experiments/results/sentiment/[ckv]*.json
               --out docs/frontier.png
           Leave out runs that began with a warm-up: their reference is another policy.
Reads      Folders of finished runs, or records of runs: validation prompts during training, test
           prompts at the end.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from jaxppo import cli
from jaxppo.errors import UserError
from jaxppo.run import files


@dataclass(frozen=True)
class Frontier:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of finished runs, or records (.json)"""
    out: Path = Path("frontier.png")
    traceback: bool = False


def read(run: Path) -> tuple[dict, dict, list[tuple[float, float]]]:
    """(config, result, [(KL, sentiment)] on validation prompts) of a run."""
    if run.suffix == ".json":
        record = json.loads(run.read_text())
        config, result, rows = record["config"], record["result"], record["validation"]
    else:
        config, result = (
            json.loads((run / name).read_text()) for name in ("config.json", "result.json")
        )
        rows = files.read_metrics(run)
    return (
        config,
        result,
        [
            (row["validation_kl"], row["validation_sentiment"])
            for row in rows
            if "validation_kl" in row
        ],
    )


def main(options: Frontier) -> None:
    if not options.runs:
        raise UserError("no runs; give at least one folder")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    reference = []
    for number, run in enumerate(options.runs):
        config, result, points = read(run)
        colour = f"C{number % 10}"
        marker = {"classifier": "o", "vader": "s", "model": "^"}[config["reward"]]
        label = (
            f"{config['reward']}, seed {config['seed']}, KL target {config['kl_target']:g}, "
            f"floor {config['kl_coef_min']:g}"
        )
        kl, sentiment = zip(*points, strict=True)
        small = {"alpha": 0.4, "markersize": 4, "linewidth": 1}
        axis.plot(kl, sentiment, "-", marker=marker, color=colour, **small)
        large = {"color": colour, "markersize": 9, "label": label}
        axis.plot(result["kl"], result["sentiment_after"], marker, **large)
        reference.append(result["sentiment_before"])
    axis.plot(0, sum(reference) / len(reference), "k*", markersize=12, label="reference model")
    axis.set(
        xlabel="KL to the reference (nats a 24-token continuation)",
        ylabel="VADER sentiment of continuations (-1 to 1)",
    )
    axis.set_title("small: validation prompts, during training; large: test prompts, at the end")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(options.out, dpi=120)
    print(f"written: {options.out}")


if __name__ == "__main__":
    cli.script(main, Frontier)
