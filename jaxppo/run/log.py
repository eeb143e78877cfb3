"""Log the metrics of a run: a file, a line or progress bar, and tables."""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from jaxppo.run.files import json_line, printable, read_metrics, write_jsonl
from jaxppo.run.samples import SampleLog

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
