"""Runs read back from their folders: settings, numbers, texts, how they were started,
and what is odd about them.

Whatever is there may be half written, damaged or made to mislead; what makes sense is
read, and what does not is counted.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxppo.config import FREE, RunConfig
from jaxppo.run import files
from jaxppo.run.settings import from_file, to_dict
from jaxppo.tasks import TaskConfig

MOST = 20_000  # lines of texts that are read
# What two runs may differ in and be the same but for chance: places, machines, how it
# is computed, and the seed. How long they go on is none of it, since the learning rate
# hangs on that.
CHANCE = (FREE - {"steps", "patience"}) | {"seed"}

# Means over the minibatches of a step whose update counted: 0 where none did, which is
# no number that was measured.
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

Numbers = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One run, or the policy's run of a task's whole way."""

    name: str
    path: Path  # as it was given
    place: Path  # of its config.json: the path itself, or policy/ below it
    settings: dict[str, Any]
    rows: list[Numbers]  # a step each, in order
    result: dict[str, Any]  # result.json
    samples: list[dict[str, Any]]  # outputs.jsonl of a whole way, or samples.jsonl
    commands: list[str]  # how it was started, and gone on with
    versions: dict[str, str]
    remarks: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether it is a task's whole way."""
        return self.place != self.path


@dataclass(frozen=True)
class Group:
    """Runs that differ by chance alone."""

    label: str
    runs: list[Run]


def read(path: Path) -> Run:
    """The run in a folder. Raises UserError for a folder that has none."""
    place = files.find_run(path)
    whole = place != path
    from_file(RunConfig, place / "config.json")  # it is one
    settings = json.loads((place / "config.json").read_text())
    remarks: list[str] = []
    rows = _steps(place / "metrics.jsonl", remarks)
    texts = path / ("outputs.jsonl" if whole else "samples.jsonl")
    result = _object(path / "result.json", remarks)
    known = path / "command.txt" if not whole else place / "command.txt"
    commands = known.read_text("utf-8", errors="replace").split("\n") if known.is_file() else []
    return Run(
        _name(path),
        path,
        place,
        settings,
        rows,
        result,
        _lines(texts, remarks)[:MOST],
        [x for x in commands if x],
        _versions(place, result),
        remarks,
    )


def _name(path: Path) -> str:
    """What a folder is called; of one stage, with the way that it belongs to."""
    found = path.resolve()
    return (
        f"{found.parent.name}/{found.name}"
        if found.name in ("policy", "supervised")
        else found.name
    )


def _lines(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a remark on the lines that are none."""
    found, damaged = [], 0
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            found.append(row)
        damaged += not isinstance(row, dict)
    if damaged:
        remarks.append(f"{path.name}: {damaged} damaged line{'s' * (damaged > 1)} left out")
    return found


def _steps(path: Path, remarks: list[str]) -> list[Numbers]:
    """The steps of metrics.jsonl, in order; remarks on what is missing or there
    twice.
    """
    found: dict[int, Numbers] = {}
    lines, valid = _lines(path, remarks), 0
    for line in lines:
        step = line.get("step")
        if isinstance(step, int) and not isinstance(step, bool) and 0 < step < 10**9:
            valid += 1
            row = {name: number(x) for name, x in line.items() if isinstance(x, int | float)}
            none = UPDATE if row.get("barren_steps", 0) > 0 and "reward" in row else ()
            found[step] = row | {name: math.nan for name in none if name in row}
    if strange := len(lines) - valid:
        remarks.append(f"{path.name}: {strange} line{'s' * (strange > 1)} without a step left out")
    if twice := valid - len(found):
        remarks.append(
            f"{path.name}: {twice} step{'s' * (twice > 1)} there more than once; the last line counts"
        )
    if found and (gaps := max(found) - len(found)):
        remarks.append(f"{path.name}: {gaps} of the first {max(found)} steps are missing")
    return [found[step] for step in sorted(found)]


def number(x: float) -> float:
    """A number of JSON, which may be an integer of any length."""
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def _object(path: Path, remarks: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes().decode()) if path.is_file() else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        remarks.append(f"{path.name} is damaged and left out")
        return {}
    return found


def _versions(place: Path, result: dict[str, Any]) -> dict[str, str]:
    """Of the libraries, from the result or else from the newest checkpoint."""
    found = result.get("versions")
    for manifest in sorted(
        (place / "checkpoints").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime
    ):
        found = found or _object(manifest, []).get("versions")
    return {str(name): str(x) for name, x in found.items()} if isinstance(found, dict) else {}


def defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """What the settings are when nobody names one, as far as the library knows: a
    script may have others.
    """
    return to_dict(TaskConfig() if "task" in settings else RunConfig())


def compared(run: Run) -> dict[str, Any]:
    """The settings that make a run what it is, without chance; a checkpoint of its own
    counts by its place in the run.
    """
    settings = defaults(run.settings) | run.settings
    root = f"{run.settings.get('runs')}/" if run.place.name == "policy" else "/"
    own = lambda x: (
        f"<run>/{x.removeprefix(root)}"
        if isinstance(x, str) and len(root) > 1 and x.startswith(root)
        else x
    )
    return {name: own(x) for name, x in settings.items() if name not in CHANCE}


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ by chance alone, together, in the order in which they were
    given.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(compared(run), sort_keys=True), []).append(run)
    labels = [_label([run.name for run in some]) for some in found.values()]
    again = [labels[:i].count(label) for i, label in enumerate(labels)]
    unique = [f"{label} ({n + 1})" if n else label for label, n in zip(labels, again, strict=True)]
    return [Group(label, some) for label, some in zip(unique, found.values(), strict=True)]


def _label(names: list[str]) -> str:
    """What the runs of a group are called together.

    >>> _label(["a-10", "a-11"]), _label(["a-10"]), _label(["one", "two"])
    ('a', 'a-10', 'one and 1 more')
    """
    stems = {re.sub(r"[-_.]?\d+$", "", name) for name in names}
    together = stems.pop() if len(stems) == 1 else ""
    return names[0] if len(names) == 1 else together or f"{names[0]} and {len(names) - 1} more"


def faults(run: Run) -> dict[str, float]:
    """What went wrong, counted over all steps."""
    total = lambda name: sum(x for row in run.rows if math.isfinite(x := row.get(name, 0.0)))
    largest = lambda name: max(
        (x for row in run.rows if not math.isnan(x := row.get(name, math.nan))), default=math.nan
    )
    return {
        "minibatches skipped": total("skipped"),
        "left out by kl_stop": total("stopped"),
        "without rows": total("empty"),
        "invalid rows": total("invalid_rows"),
        "barren steps in a row": largest("barren_steps"),
        "steps with a number that is not finite": sum(
            not all(map(math.isfinite, row.values())) for row in run.rows
        ),
        "largest first_ratio_off": largest("first_ratio_off"),
    }
