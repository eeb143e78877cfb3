"""Folders of runs and tasks for the tests of the report."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

from runs import a_run, lines

from jaxppo.config import RunConfig
from jaxppo.tasks import TaskConfig

OUTPUTS = [
    {"prompt": f"p{i}", "supervised": "no", "policy": "yes" if i < 3 else "no", "reference": "yes"}
    for i in range(4)
]


RESULT = {
    "supervised": {"score": 0.0, "exact": 0.0},
    "policy": {"score": 0.75, "exact": 0.75},
    "gain": {"exact": [0.75, 0.25, 1.0]},
    "test_rows": 4,
    "versions": {"jax": "9.9", "git": "0123456789abcdef"},
    "config": {"steps": 3, "task": "spelling", "lora": 0},
}


def rows(rewards, **others) -> str:
    return lines(
        *({"step": k, "reward": x, "kl": k / 4, **others} for k, x in enumerate(rewards, 1))
    )


def seeds(tmp_path, name: str, *curves, **changes) -> list[Path]:
    base = RunConfig(steps=len(curves[0]), **changes)
    make = lambda seed, curve: a_run(
        tmp_path / f"{name}-{seed}", replace(base, seed=seed), metrics_jsonl=rows(curve)
    )
    return [make(seed, curve) for seed, curve in enumerate(curves)]


def a_task(root: Path, *, seed: int = 0, outputs=OUTPUTS, result=RESULT, steps: int = 3) -> Path:
    root.mkdir()
    validation = {"validation_score": 0.5, "validation_exact": 0.5}
    config = TaskConfig(task="spelling", steps=steps, seed=seed, runs=str(root), name="policy")
    a_run(root / "policy", config, metrics_jsonl=rows([0.1, 0.2, 0.3], **validation))
    (root / "outputs.jsonl").write_text(lines(*outputs))
    (root / "result.json").write_text(json.dumps(result))
    return root


def in_csv(folder: Path) -> dict[tuple[str, str, str, str], tuple[float, ...]]:
    """{(group, run, number, on): (value, low, high)} of report.csv."""
    with (folder / "report.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    number = lambda x: float(x) if x else math.nan
    return {
        (x["group"], x["run"], x["number"], x["on"]): tuple(
            number(x[k]) for k in ("value", "low", "high")
        )
        for x in found
    }
