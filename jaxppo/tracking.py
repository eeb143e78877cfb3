"""What a run leaves on disk and on the screen: `runs/<name>/` with config.json, command.txt, metrics.jsonl, samples.jsonl,
curves.png."""

import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from jaxppo import __version__, processes
from jaxppo.config import HIDDEN, RunConfig, UserError, to_dict

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
SECRET = re.compile(r"(?i)(^|_)(token|key|secret|password)$")  # names of settings whose text is nobody's business
CREDENTIALS = re.compile(r"//[^/@\s]+@")  # of an address
PANELS = (  # (key in metrics.jsonl, title, unit)
    ("reward", "reward", "score a response"),
    ("kl", "KL to the reference", "nats a response"),
    ("entropy", "entropy", "nats a token"),
    ("clip_fraction", "clipped tokens", "share"),
    ("explained_variance", "explained variance of the critic", "share"),
    ("tokens_per_second", "speed", "sampled tokens / s"),
)


def check_name(name: str) -> None:
    """Raise UserError for a name that could lead out of the folder of runs."""
    if not NAME.fullmatch(name) or name.strip(".") == "":
        raise UserError(f"--name {name!r}: use 1 to 64 letters, digits, '.', '_' or '-'")


def run_folder(root: str | Path, name: str, *, resume: bool) -> Path:
    """The folder of a run: made new, or found again when resuming. Raises UserError when that is not what is there."""
    check_name(name)
    folder = Path(root) / name
    if not processes.is_main():  # process 0 has looked, or will
        return folder
    started = (folder / "config.json").exists()
    if started and not resume:
        raise UserError(f"{folder} exists: choose another --name, or continue it with --resume")
    if not started and resume:
        raise UserError(f"nothing to resume in {folder}; start it without --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another --runs folder") from error
    return folder


def begun(folder: Path) -> bool:
    """Whether there is a run in a folder; of several processes as the first one sees it, which may write there meanwhile."""
    return bool(processes.from_main(int((folder / "config.json").exists())))


def place_of(folder: Path) -> Path:
    """Where a run's config.json lies: the folder, or `policy` in that of a task's whole way. Raises UserError without one."""
    found = next((place for place in (folder, folder / "policy") if (place / "config.json").is_file()), None)
    if found is None:
        raise UserError(f"no run in {folder}; give the folder that holds its config.json, or that of a task's whole way")
    return found


def write_config(folder: Path, config: dict) -> None:
    """config.json, whole or not at all; what looks like a secret is left out."""
    write_whole(folder / "config.json", json.dumps(shown(config), indent=2) + "\n")


def shown(config: dict) -> dict:
    """Settings for others' eyes: what looks like a secret is hidden."""
    return {name: HIDDEN if SECRET.search(name) and isinstance(x, str) and x else x for name, x in config.items()}


def write_command(folder: Path) -> None:
    """One line more in command.txt: how this process was started. None in a notebook, where nobody typed a command."""
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) is None:
        return
    module = main.__spec__.name.removesuffix(".__main__") if main.__spec__ else ""
    path = folder / "command.txt"
    before = path.read_text("utf-8", errors="replace") if path.exists() else ""
    write_whole(path, before + command_line(sys.argv, module=module) + "\n")


def command_line(words: Sequence[str], *, module: str = "") -> str:
    """A command as it was typed, to be typed again: without secrets, and without the place where a program was found.

    >>> command_line(["experiments/sft.py", "--hub-token", "abc", "--data", "my pairs.jsonl"])
    "python experiments/sft.py --hub-token '***' --data 'my pairs.jsonl'"
    >>> command_line(["/home/me/venv/bin/jaxppo", "plan", "--api-key=abc", "--model", "https://me:abc@example.org/x"])
    "jaxppo plan '--api-key=***' --model 'https://***@example.org/x'"
    """
    program = ["python", words[0]] if words[0].endswith(".py") else [Path(words[0]).name]
    shown, secret = ["python", "-m", module] if module else program, False
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        hides = word.startswith("--") and SECRET.search(name.removeprefix("--").replace("-", "_")) is not None
        word = HIDDEN if secret else f"{name}={HIDDEN}" if hides and equals else CREDENTIALS.sub(rf"//{HIDDEN}@", word)
        shown.append(word)
        secret = hides and not equals
    return printable(shlex.join(shown))


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings as a record keeps them, without the places of one machine."""
    return {name: x for name, x in to_dict(config).items() if name not in ("runs", "results")}


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all, whenever the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def keep_record(folder: str, name: str, record: dict[str, Any]) -> Path | None:
    """Write <folder>/<name>.json, whole or not at all, and say where; nothing where no folder is named. A number that is not
    finite is null there, as JSON has it."""
    if not folder:
        return None
    place = Path(folder) / f"{name}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, json.dumps(finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return place


def finite(x: Any) -> Any:
    """What JSON can hold: None in place of numbers that are not finite.

    >>> finite({"a": [1.0, float("nan")], "b": (float("inf"), "c")})
    {'a': [1.0, None], 'b': [None, 'c']}
    """
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def keep_result(folder: Path, config: RunConfig, result: dict[str, Any], *, results: str, kind: str, **more: Any) -> None:
    """Write what a run has found: <folder>/result.json; and where `results` names a folder, <results>/<kind>/<name>.json, which
    has its settings, the minutes of its steps, the versions, and `more` besides. Of several processes the first writes."""
    if not processes.is_main():
        return
    keep_record(str(folder), "result", result)
    record = {"config": settings_of(config), "result": result, "minutes": minutes(folder), "versions": versions()}
    keep_record(results, f"{kind}/{config.name}", record | more)


def minutes(run: Path) -> float:
    """Minutes of a run's steps, compilation included."""
    return round(sum(row["seconds"] for row in read_lines(run / "metrics.jsonl")) / 60, 2)


def versions() -> dict[str, str]:
    """Of this code (its git commit, where it is a checkout; "+changed" where Python files are not as committed) and of what it
    stands on."""
    found = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")}
    here = Path(__file__).parent
    commit = ""
    if (here.parent / ".git").exists():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            git = lambda *words: subprocess.run(
                ["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=10
            )
            commit = git("rev-parse", "HEAD").stdout.strip()
            commit += "+changed" * (commit != "" and git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1)
    return {"jaxppo": __version__, "git": commit, "python": sys.version.split()[0], **found}


def read_lines(path: Path) -> list[dict]:
    """Records of a .jsonl file; a half-written last line is left out."""
    rows = []
    for line in path.read_text("utf-8").split("\n") if path.exists() else []:  # a text may hold other ends of lines
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Log:
    """Takes what a run has to say and keeps none of it: that of all processes but the first."""

    def log(self, rows: Sequence[dict[str, float]]) -> None:
        """One dict of numbers for each step; every one has its `step`, counted from 1."""

    def say(self, text: str) -> None:
        """One line of news."""

    def samples(self, rows: Sequence[dict]) -> None:
        """Records of samples."""

    def settle(self) -> None:
        """A checkpoint comes: what was logged until here is to outlive this process."""

    def close(self) -> None:
        """Nothing more comes."""


class Tracker(Log):
    """Writes one line a step, and shows a progress bar, or a plain line a step where there is no terminal."""

    def __init__(self, folder: Path, *, first_step: int, total_steps: int):
        self.folder = folder
        # Steps after the checkpoint that a run resumes from will be run again: their lines go.
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
        """Write one line for each step, and show it. Every row has its `step`, counted from 1."""
        for row in rows:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            step = int(row["step"])
            left = int((time.monotonic() - self.started) / (step - self.first) * (self.total - step))
            line = _line(row) + f"  left {left // 60}:{left % 60:02d}"
            if self.bar is None:
                print(f"step {step}/{self.total}  {line}", flush=True)
            else:
                self.bar.update(self.task, completed=step, description=line)

    def _open(self) -> None:
        self.file = (self.folder / "metrics.jsonl").open("a")

    def settle(self) -> None:
        """Close the file and go on: in a bucket that is mounted as a folder, what is written is there once its file is closed."""
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
        with contextlib.suppress(OSError):  # of a full disk the write has told already; what it left is written again here
            self.file.close()


def _line(metrics: dict[str, float]) -> str:
    shown = (("reward", "reward", ".3f"), ("kl", "KL", ".2f"), ("entropy", "entropy", ".2f"), ("clip_fraction", "clip", ".3f"))
    if "reward" not in metrics:
        shown = (("loss", "loss", ".3f"), ("accuracy", "accuracy", ".3f"), ("validation_loss", "validation", ".3f"))
    parts = [f"{name} {metrics[key]:{form}}" for key, name, form in shown if key in metrics]
    return "  ".join([*parts, f"{metrics['tokens_per_second']:.0f} tok/s"])


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; cells are text of a model and are never read as markup. Control characters are shown, not obeyed."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    out = Table(title=title, show_lines=True)
    for name in header:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*(Text(printable(str(cell))) for cell in row))
    console.print(out)


def printable(text: str) -> str:
    """The text with control characters written out.

    >>> printable("a\\x1b[31mb\\nc")
    'a\\\\x1b[31mb c'
    """
    text = text.replace("\n", " ").replace("\t", " ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plot_curves(folder: Path) -> Path:
    """curves.png from metrics.jsonl: one panel for each of the main metrics, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_lines(folder / "metrics.jsonl")
    panels = [panel for panel in PANELS if any(panel[0] in row for row in rows)]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), constrained_layout=True, sharex=True)
    for axis, (key, title, unit) in zip(axes.flat, panels, strict=False):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="each step")
        smooth = _running_mean([y for _, y in points], 10)
        axis.plot([x for x, _ in points], smooth, color="tab:blue", linewidth=2, label="mean of 10")
        held_out = [(row["step"], row[f"validation_{key}"]) for row in rows if f"validation_{key}" in row]
        if held_out:
            axis.plot(*zip(*held_out, strict=True), "o--", color="tab:orange", label="validation prompts")
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
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
