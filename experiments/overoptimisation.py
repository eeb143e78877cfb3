"""Plot a reward and a judge that is not optimised, as the policy leaves its reference.

Question   Does the reward rise while the judge falls (Gao et al. 2023,
           https://arxiv.org/abs/2210.10760)?
Command    python experiments/dialogue.py --name free --kl-coef 0 --no-kl-adaptive
           python experiments/overoptimisation.py runs/free runs/dialogue
               --out docs/overoptimisation.png
Reads      metrics.jsonl of runs whose validation has `kl` and two metrics to compare.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from jaxppo import cli
from jaxppo.errors import UserError
from jaxppo.run import files


@dataclass(frozen=True)
class Overoptimisation:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs"""
    proxy: str = "reward"
    """the optimised metric, as the validation names it"""
    judge: str = "judge"
    """the metric that is not optimised"""
    out: Path = Path("overoptimisation.png")
    traceback: bool = False


def points(run: Path, names: tuple[str, ...]) -> list[list[float]]:
    """(KL, proxy, judge) of each evaluation of a run, in the order of the KL."""
    path = run / "policy" / "metrics.jsonl"
    path = path if path.exists() else run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"no metrics.jsonl in {run}; give the folder of a run")
    rows = files.read_metrics(path.parent)
    found = sorted(
        [row[f"validation_{name}"] for name in names]
        for row in rows
        if f"validation_{names[-1]}" in row
    )
    if not found:
        raise UserError(
            f"the evaluations of {run} have no {', '.join(names)}; run it with --eval-every"
        )
    return found


def main(options: Overoptimisation) -> None:
    if not options.runs:
        raise UserError("no runs; give at least one folder")
    count = len(options.runs)
    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for axis, run in zip(axes, options.runs, strict=True):
        kl, proxy, judge = zip(*points(run, ("kl", options.proxy, options.judge)), strict=True)
        axis.plot(kl, proxy, "o-", color="#0072B2", label=f"{options.proxy} (optimised)")
        axis.plot(kl, judge, "s--", color="#D55E00", label=f"{options.judge} (unseen)")
        axis.set(title=run.name, xlabel="KL to the reference (nats a response)", ylabel="score")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(options.out, dpi=120)
    print(f"written: {options.out}")


if __name__ == "__main__":
    cli.script(main, Overoptimisation)
