"""Read runs from their folders: settings, metrics, samples, commands and versions.

Files may be half written, damaged or hostile. What can be read is read; the rest is
counted in `Run.notes`.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxppo.config import NO_RESULTS, RunConfig
from jaxppo.run import files
from jaxppo.run.settings import read_config, to_dict
from jaxppo.tasks import TaskConfig

MAX_SAMPLES = 20_000

# Runs that differ only in these settings form one group: the seed, folders, machines.
# `patience` is not among them, because it sets the learning rate, and nor is the format
# of prompts.
CHANCE = (NO_RESULTS - {"patience", "prompt_format"}) | {"seed"}

# Means over the minibatches that updated the policy. They read 0 in a step in which
# every minibatch was skipped.
UPDATE = (
    "loss",
    "policy_loss",
    "value_loss",
    "entropy",
    "clip_fraction",
    "approx_kl",
    "last_approx_kl",
    "explained_variance",
    "grad_norm",
)

Metrics = dict[str, float]


@dataclass(frozen=True)
class Run:
    """A run, or a task's folder with the run of its last stage."""

    name: str
    folder: Path  # as it was given
    config_folder: Path  # of config.json: `folder`, or policy/ in a task's folder
    settings: dict[str, Any]
    rows: list[Metrics]  # one for each step, in order
    result: dict[str, Any]  # result.json
    samples: list[dict[str, Any]]  # outputs.jsonl, or samples.jsonl if there is none
    commands: list[str]  # that started and resumed it
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def is_task(self) -> bool:
        """Whether the folder is a task's, with several stages."""
        return self.config_folder != self.folder

    @property
    def plays_episodes(self) -> bool:
        """Whether an environment answered the policy: that of a task, or one that
        `train.policy` was given.
        """
        given = str(self.settings.get("functions", "")).split(", ")
        named = any(x.startswith("environment ") for x in given)
        return named or bool(self.settings.get("environment"))


@dataclass(frozen=True)
class Group:
    """Runs with the same settings, except for the seed."""

    label: str
    runs: list[Run]


def read(folder: Path) -> Run:
    """Read the run in a folder. Raises UserError when there is none."""
    config_folder = files.find_run(folder)
    read_config(RunConfig, config_folder / "config.json")  # raises UserError if damaged
    notes: list[str] = []
    rows = _read_steps(config_folder / "metrics.jsonl", notes)
    result = _read_object(folder / "result.json", notes)
    compared, while_training = folder / "outputs.jsonl", config_folder / "samples.jsonl"
    samples = _read_lines(compared if compared.is_file() else while_training, notes)
    commands = config_folder / "command.txt"
    text = commands.read_text("utf-8", errors="replace") if commands.is_file() else ""
    place = folder.resolve()
    stage = place.name in ("policy", "supervised")
    return Run(
        name=f"{place.parent.name}/{place.name}" if stage else place.name,
        folder=folder,
        config_folder=config_folder,
        settings=json.loads((config_folder / "config.json").read_text()),
        rows=rows,
        result=result,
        samples=samples[:MAX_SAMPLES],
        commands=[line for line in text.split("\n") if line],
        versions=_versions(config_folder, result),
        notes=notes,
    )


def _parse(text: bytes) -> dict[str, Any] | None:
    """A JSON object, or None for anything else."""
    try:
        found = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    found = _parse(path.read_bytes()) if path.is_file() else {}
    if found is None:
        notes.append(f"{path.name} is damaged and was ignored")
    return found or {}


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; damaged lines are counted in `notes`."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    parsed = [_parse(line) for line in lines if line.strip()]
    found = [row for row in parsed if row is not None]
    if damaged := len(parsed) - len(found):
        notes.append(f"{path.name}: ignored {counted(damaged, 'damaged line')}")
    return found


def _read_steps(path: Path, notes: list[str]) -> list[Metrics]:
    """The steps of metrics.jsonl, in order; missing and repeated ones are noted."""
    found: dict[int, Metrics] = {}
    lines, valid = _read_lines(path, notes), 0
    for line in lines:
        step = line.get("step")
        if isinstance(step, int) and not isinstance(step, bool) and 0 < step < 10**9:
            valid += 1
            numbers = {name: math.nan if x is None else x for name, x in line.items()}
            row = {name: to_float(x) for name, x in numbers.items() if isinstance(x, int | float)}
            if row.get("barren_steps", 0) > 0 and "reward" in row:
                row |= {name: math.nan for name in UPDATE if name in row}
            found[step] = row
    if strange := len(lines) - valid:
        notes.append(f"{path.name}: ignored {counted(strange, 'line')} without a step")
    if repeated := valid - len(found):
        notes.append(f"{path.name}: {counted(repeated, 'repeated step')}; the last line counts")
    if found and (gaps := max(found) - len(found)):
        notes.append(f"{path.name}: {gaps} of the first {max(found)} steps are missing")
    return [found[step] for step in sorted(found)]


def counted(number: int, noun: str) -> str:
    """A number and a noun.

    >>> counted(1, "run"), counted(2, "run")
    ('1 run', '2 runs')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def to_float(x: float) -> float:
    """A JSON number as a float; a huge integer is infinite."""
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def _versions(folder: Path, result: dict[str, Any]) -> dict[str, str]:
    """Library versions, from the result or else from the newest checkpoint."""
    found = result.get("versions")
    manifests = (folder / "checkpoints").glob("*/manifest.json")
    for manifest in sorted(manifests, key=lambda path: -path.stat().st_mtime):
        found = found or _read_object(manifest, []).get("versions")
    return {str(name): str(x) for name, x in found.items()} if isinstance(found, dict) else {}


def defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The library's default settings; a script may have others."""
    return to_dict(TaskConfig() if "task" in settings else RunConfig())


def group_settings(run: Run) -> dict[str, Any]:
    """The settings that runs of one group share. A path inside the run's own folder is
    written as <run>/...
    """
    settings = defaults(run.settings) | run.settings
    root = f"{run.settings.get('runs')}/" if run.config_folder.name == "policy" else "/"
    inside = lambda x: isinstance(x, str) and len(root) > 1 and x.startswith(root)
    own = lambda x: f"<run>/{x.removeprefix(root)}" if inside(x) else x
    return {name: own(x) for name, x in settings.items() if name not in CHANCE}


def groups(runs: Sequence[Run]) -> list[Group]:
    """Group the runs that differ only by chance; the given order is kept."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(group_settings(run), sort_keys=True), []).append(run)
    labels = [_label([run.name for run in some]) for some in found.values()]
    earlier = [labels[:i].count(label) for i, label in enumerate(labels)]
    unique = [f"{label} ({n + 1})" if n else label for label, n in zip(labels, earlier)]
    return [Group(label, some) for label, some in zip(unique, found.values())]


def _label(names: list[str]) -> str:
    """A name for a group of runs.

    >>> _label(["a-10", "a-11"]), _label(["a-10"]), _label(["one", "two"])
    ('a', 'a-10', 'one and 1 more')
    """
    if len(names) == 1:
        return names[0]
    stems = {re.sub(r"[-_.]?\d+$", "", name) for name in names}
    return (len(stems) == 1 and stems.pop()) or f"{names[0]} and {len(names) - 1} more"


def faults(run: Run) -> dict[str, float]:
    """What went wrong in a run, counted over all steps."""
    values = lambda name: [row[name] for row in run.rows if name in row]
    total = lambda name: sum(filter(math.isfinite, values(name)))
    largest = lambda name: max((x for x in values(name) if not math.isnan(x)), default=math.nan)
    return {
        "minibatches skipped": total("skipped"),
        "left out by kl_stop": total("stopped"),
        "without rows": total("empty"),
        "invalid rows": total("invalid_rows"),
        "most steps in a row without an update": largest("barren_steps"),
        "steps with a non-finite number": sum(
            not all(map(math.isfinite, row.values())) for row in run.rows
        ),
        "largest first_ratio_off": largest("first_ratio_off"),
    }
