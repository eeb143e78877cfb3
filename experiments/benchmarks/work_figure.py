"""Draw docs/work.svg: the work of a step against the tokens that exist, counted.

python experiments/benchmarks/work_figure.py

Left, positions that an epoch of the update computes in `ragged.py` at S, for groups of 8 and for
single responses. Right, what the decode loop of SmolLM2-135M reads on each device of a v5e:2x2:
32 responses of the list "plan" in `lengths.json` (mean 339, at most 1,024), 4 prompts of 512
tokens, bfloat16.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import ragged
from jax.sharding import AbstractMesh

from jaxppo import cli
from jaxppo.commands.plan import SHAPES
from jaxppo.config import RunConfig
from jaxppo.costs import phases


@dataclass(frozen=True)
class Options:
    out: Path = Path("docs/work.svg")
    """the file to write"""


def main(options: Options) -> None:
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "jaxppo"  # the same bytes each time
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.9), layout="constrained")
    draw_positions(left)
    draw_bytes(right)
    figure.savefig(options.out, metadata={"Date": None})


def draw_positions(axis) -> None:
    work = ragged.WORKS["S"]
    lengths = ragged.response_lengths(work, full=False)
    names, bars = [], {"dense": [], "packed": [], "tokens": []}
    for group in (8, 1):
        settings = RunConfig(
            batch_size=work.rows,
            group_size=group,
            minibatches=4,
            prompt_length=work.prompt,
            response_length=work.response,
        )
        found = ragged.positions_of_an_epoch(settings, work, lengths)
        names.append(f"G = {group}")
        for name, values in bars.items():
            values.append(found[name])
    for number, (name, values) in enumerate(bars.items()):
        places = np.arange(2) + 0.27 * (number - 1)
        label = {"tokens": "tokens that exist"}.get(name, name)
        drawn = axis.bar(places, values, 0.25, label=label)
        axis.bar_label(drawn, [f"{x:,}" for x in values], fontsize=7)
    axis.set_xticks(np.arange(2), names)
    axis.set_title("update: positions of an epoch", fontsize=10)
    axis.set_ylim(0, 30_000)  # room for the legend
    axis.legend(fontsize=8, ncols=3, loc="upper center")


def draw_bytes(axis) -> None:
    shape, mesh = SHAPES["smollm2"], AbstractMesh((4, 1, 1), ("data", "fsdp", "tensor"))
    settings = RunConfig(
        algorithm="grpo",
        group_size=8,
        batch_size=128,
        prompt_length=512,
        response_length=1024,
        dtype="bfloat16",
        lora=0,
    )
    lengths = np.asarray(ragged.LENGTHS["plan"])
    below = np.zeros(2)
    kinds = [
        phases.decode_bytes(settings, shape, mesh, phases.decoding(settings, lengths, packs=packs))
        for packs in (False, True)
    ]
    for part in ("weights", "prompts", "responses"):
        sizes = np.array([kind[part] / 1e9 for kind in kinds])
        label = part if part == "weights" else f"cache of {part}"
        drawn = axis.bar(("dense", "packed"), sizes, 0.5, bottom=below, label=label)
        axis.bar_label(drawn, [f"{x:.0f}" for x in sizes], label_type="center", fontsize=7)
        below += sizes
    axis.set_title("decode loop: GB read a device", fontsize=10)
    axis.legend(fontsize=8)


if __name__ == "__main__":
    cli.script(main, Options)
