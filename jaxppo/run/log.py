"""Log the metrics of a run: lines, tables, curves."""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from jaxppo.run.files import printable, read_lines, write_whole

PANELS = (  # (key in metrics.jsonl, title, unit)
    ("reward", "reward", "score a response"),
    ("kl", "KL to the reference", "nats a response"),
    ("entropy", "entropy", "nats a token"),
    ("clip_fraction", "clipped tokens", "share"),
    ("explained_variance", "explained variance of the critic", "share"),
    ("tokens_per_second", "speed", "sampled tokens / s"),
)


class Log:
    """Takes what a run has to say and keeps none of it: that of all processes but the
    first.
    """

    def log(self, rows: Sequence[dict[str, float]]) -> None:
        """One dict of numbers for each step; every one has its `step`, counted from
        1.
        """

    def say(self, text: str) -> None:
        """One line of news."""

    def samples(self, rows: Sequence[dict]) -> None:
        """Records of samples."""

    def settle(self) -> None:
        """A checkpoint comes: what was logged until here is to outlive this process."""

    def close(self) -> None:
        """Nothing more comes."""


class Tracker(Log):
    """Writes one line a step, and shows a progress bar, or a plain line a step where
    there is no terminal.
    """

    def __init__(self, folder: Path, *, first_step: int, total_steps: int):
        self.folder = folder
        # Steps after the checkpoint that a run resumes from will be run again: their
        # lines go.
        kept = [row for row in read_lines(folder / "metrics.jsonl") if row["step"] <= first_step]
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self._open()
        self.console = Console()
        self.total = total_steps
        self.first = first_step
        self.started = time.monotonic()
        self.bar = None
        if self.console.is_terminal:
            step = TextColumn("step {task.completed}/{task.total}")
            columns = (step, BarColumn(bar_width=20), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("compiling", total=total_steps, completed=first_step)
            self.bar.start()

    def log(self, rows: Sequence[dict[str, float]]) -> None:
        """Write one line for each step, and show it. Every row has its `step`, counted
        from 1.
        """
        for row in rows:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            step = int(row["step"])
            left = int(
                (time.monotonic() - self.started) / (step - self.first) * (self.total - step)
            )
            line = _line(row) + f"  left {left // 60}:{left % 60:02d}"
            if self.bar is None:
                print(f"step {step}/{self.total}  {line}", flush=True)
            else:
                self.bar.update(self.task, completed=step, description=line)

    def _open(self) -> None:
        self.file = (self.folder / "metrics.jsonl").open("a")

    def settle(self) -> None:
        """Close the file and go on: in a bucket that is mounted as a folder, what is
        written is there once its file is closed.
        """
        self.file.close()
        self._open()

    def say(self, text: str) -> None:
        """One line of news, above the progress bar."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.console.print(Text(text))

    def samples(self, rows: Sequence[dict]) -> None:
        """Append records to samples.jsonl."""
        with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        with contextlib.suppress(
            OSError
            # of a full disk the write has told already; what it left is written again here
        ):
            self.file.close()


def _line(metrics: dict[str, float]) -> str:
    shown = (
        ("reward", "reward", ".3f"),
        ("kl", "KL", ".2f"),
        ("entropy", "entropy", ".2f"),
        ("clip_fraction", "clip", ".3f"),
    )
    if "reward" not in metrics:
        shown = (
            ("loss", "loss", ".3f"),
            ("accuracy", "accuracy", ".3f"),
            ("validation_loss", "validation", ".3f"),
        )
    parts = [f"{name} {metrics[key]:{form}}" for key, name, form in shown if key in metrics]
    return "  ".join([*parts, f"{metrics['tokens_per_second']:.0f} tok/s"])


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; cells are text of a model and are never read as markup. Control
    characters are shown, not obeyed.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    out = Table(title=title, show_lines=True)
    for name in header:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*(Text(printable(str(cell))) for cell in row))
    console.print(out)


def plot_curves(folder: Path) -> Path:
    """curves.png from metrics.jsonl: one panel for each of the main metrics, over
    steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_lines(folder / "metrics.jsonl")
    panels = [panel for panel in PANELS if any(panel[0] in row for row in rows)]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), constrained_layout=True, sharex=True)
    for axis, (key, title, unit) in zip(axes.flat, panels, strict=False):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(
            *zip(*points, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="each step"
        )
        smooth = _running_mean([y for _, y in points], 10)
        axis.plot([x for x, _ in points], smooth, color="tab:blue", linewidth=2, label="mean of 10")
        held_out = [
            (row["step"], row[f"validation_{key}"]) for row in rows if f"validation_{key}" in row
        ]
        if held_out:
            axis.plot(
                *zip(*held_out, strict=True), "o--", color="tab:orange", label="validation prompts"
            )
        axis.set(title=title, ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)
    return folder / "curves.png"


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]
