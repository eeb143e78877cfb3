"""`jaxppo eval`: measure a run on held-out examples."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from jaxppo.run import files, load
from jaxppo.tasks import measure


@dataclass(frozen=True)
class EvalOptions:
    """Measure a trained run on a task's held-out examples, with 95 % intervals. Writes
    eval.json and eval.jsonl in its folder.

    $ jaxppo eval runs/translation --task translation
    $ jaxppo eval runs/spelling --task spelling --samples 8
    $ jaxppo eval runs/spelling --task spelling --checkpoint newest
    """

    RANGES: ClassVar = {"rows": "(0, inf)", "samples": "[0, inf)"}

    run: tyro.conf.Positional[Path]
    """folder of the task or of one run"""
    task: str
    """name of the task"""
    rows: int = 500
    """maximum number of test examples"""
    samples: int = 0
    """samples for each example, for pass@k; 0 = no pass@k"""
    data: str = ""
    """file of examples ({"prompt": ..., "reference": ...} in each line) or hub dataset
    id; all are measured. Default: the test part of the run's or the task's data
    """
    checkpoint: str = "best"
    """best (by validation score, else by training reward), newest, or a step"""
    raw: bool = False
    """of a run with --ema-decay: the weights of the step, not their average"""


def evaluate(options: EvalOptions) -> None:
    """Measure a run, print its metrics and write them."""
    load.use_compilation_cache()
    given = dataclasses.asdict(options)
    done = measure.evaluate_run(given.pop("run"), given.pop("task"), **given)
    outputs = done.pop("outputs")
    files.write_jsonl(options.run / "eval.jsonl", outputs)
    files.write_atomically(options.run / "eval.json", json.dumps(done, indent=1) + "\n")
    for name, x in done.items():
        if isinstance(x, list):
            about = f"95 % interval {x[1]:.3f} to {x[2]:.3f} over {done['test_rows']} examples"
            print(f"{name}: {x[0]:.3f} ({about})")
        elif name.startswith("pass@"):
            print(f"{name}: {x:.3f}")
