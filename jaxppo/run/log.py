"""Log the metrics of a run: a file, a line or progress bar, tables and curves."""

import contextlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from jaxppo.run.files import json_line, printable, read_metrics, write_jsonl
from jaxppo.run.samples import SampleLog

PANELS = (  # (key in metrics.jsonl, title, unit)
    ("reward", "reward", "score a response"),
    ("kl", "KL to the reference", "nats a response"),
    ("teacher_kl", "KL to the teacher", "nats a response"),
    ("entropy", "entropy", "nats a token"),
    ("clip_fraction", "clipped tokens", "share"),
    ("explained_variance", "explained variance of the critic", "share"),
    ("tokens_per_second", "speed", "sampled tokens / s"),
)
# (key, name, format) of the printed line: of a policy, and of a supervised stage
POLICY = (
    ("reward", "reward", ".3f"),
    ("kl", "KL", ".2f"),
    ("entropy", "entropy", ".2f"),
    ("clip_fraction", "clip", ".3f"),
)
SUPERVISED = (
    ("loss", "loss", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("validation_loss", "validation", ".3f"),
)


class Log:
    """A log that drops everything, for all processes but the first."""

    def log(self, rows: Sequence[dict[str, float]]) -> None:
        """Log the metrics of some steps; every row has its `step`, counted from 1."""

    def samples(self, step: int, samples: np.ndarray) -> None:
        """Log the responses of `step_metrics.first_samples`."""

    def say(self, text: str) -> None:
        """Print a line of news."""

    def flush(self) -> None:
        """Make what was logged outlive this process; called before a checkpoint."""

    def close(self) -> None:
        """Finish; nothing more is logged."""


class FileLog(Log):
    """Writes metrics.jsonl, and shows a progress bar, or a line a step without a
    terminal.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        total_steps: int,
        sample_log: SampleLog | None = None,
    ):
        self.path, self.sample_log = folder / "metrics.jsonl", sample_log
        # Steps after the checkpoint that a run resumes from will run again.
        write_jsonl(self.path, [row for row in read_metrics(folder) if row["step"] <= first_step])
        self.file = self.path.open("a")
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
        for row in rows:
            self.file.write(json_line(row))
            self.file.flush()
            step = int(row["step"])
            seconds_per_step = (time.monotonic() - self.started) / (step - self.first)
            left = int(seconds_per_step * (self.total - step))
            line = _summary(row) + f"  left {left // 60}:{left % 60:02d}"
            if self.bar is None:
                print(f"step {step}/{self.total}  {line}", flush=True)
            else:
                self.bar.update(self.task, completed=step, description=line)

    def samples(self, step: int, samples: np.ndarray) -> None:
        if self.sample_log is not None:
            self.sample_log.write(step, samples)

    def say(self, text: str) -> None:
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.console.print(Text(text))

    def flush(self) -> None:
        """Close and reopen the file: a mounted bucket shows a file once it is
        closed.
        """
        self.file.close()
        self.file = self.path.open("a")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        # After a failed write (a full disk) closing writes again; the first error
        # counts.
        with contextlib.suppress(OSError):
            self.file.close()


def _summary(metrics: dict[str, float]) -> str:
    """The main metrics of a step, for one line."""
    shown = POLICY if "reward" in metrics else SUPERVISED
    parts = [f"{name} {metrics[key]:{form}}" for key, name, form in shown if key in metrics]
    return "  ".join([*parts, f"{metrics['tokens_per_second']:.0f} tok/s"])


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. Cells may be a model's text: markup in them is not read, and
    control characters are escaped.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    out = Table(title=title, show_lines=True)
    for name in header:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*(Text(printable(str(cell))) for cell in row))
    console.print(out)


def score_keys(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """The metrics of named scores, in the order of the rows.

    >>> score_keys([{"reward": 1.0, "score_right": 0.5}, {"score_short": 0.0}])
    ['score_right', 'score_short']
    """
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith("score_")))


def plot_curves(folder: Path) -> Path:
    """Draw curves.png from metrics.jsonl: one panel for each main metric, over
    steps.
    """
    import matplotlib  # slow to import, and needed once, at the end of a run

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    keys = dict.fromkeys(key for row in rows for key in row)
    scores = [
        (key, key.replace("_", " ", 1), "mean, without its weight") for key in score_keys(rows)
    ]
    drawn = lambda key: key in keys and (key == "reward" or any(row.get(key) for row in rows))
    panels = [panel for panel in (*PANELS, *scores) if drawn(panel[0])]
    if sampled := [key for key in keys if "@" in key]:
        panels.append(("@", "several samples of a validation prompt", "score, share of prompts"))
    height = max(2, -(-len(panels) // 3))
    size = (12, 3 * height)
    figure, axes = plt.subplots(height, 3, figsize=size, constrained_layout=True, sharex=True)
    for axis, (key, title, unit) in zip(axes.flat, panels, strict=False):
        if key == "@":
            for name in sampled:
                _plot_evaluations(axis, rows, name, label=name.removeprefix("validation_"))
        else:
            _plot_metric(axis, rows, key)
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


def _plot_metric(axis, rows: Sequence[dict[str, float]], key: str) -> None:
    """One metric: each step, the running mean, and the values on validation prompts."""
    steps, values = zip(*((row["step"], row[key]) for row in rows if key in row), strict=True)
    axis.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    smooth = _running_mean(values, 10)
    axis.plot(steps, smooth, color="tab:blue", linewidth=2, label="mean of 10")
    look = {"color": "tab:orange", "label": "validation prompts"}
    _plot_evaluations(axis, rows, f"validation_{key}", **look)


def _plot_evaluations(axis, rows: Sequence[dict[str, float]], key: str, **look: str) -> None:
    """A metric that only some steps have."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        axis.plot(*zip(*points, strict=True), "o--", **look)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of up to `window` values up to each one."""
    parts = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]
