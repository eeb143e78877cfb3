"""`jaxppo eval`: the metrics of a run on held-out examples."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxppo.run import files, load
from jaxppo.tasks import measure


@dataclass(frozen=True)
class EvalOptions:
    """Metrics of a trained run on a task's held-out examples, with 95 % intervals;
    writes eval.json and eval.jsonl there.

    $ jaxppo eval runs/translation --task translation
    $ jaxppo eval runs/spelling --task spelling --samples 8
    """

    run: tyro.conf.Positional[Path]
    """the folder of a task's whole way, or of one run"""
    task: str
    """name of the task"""
    rows: int = 500
    """most test examples"""
    samples: int = 0
    """samples for each example, for pass@k; 0 = none"""
    data: str = ""
    """examples, all of which are measured: a file of {"prompt": ..., "reference": ...}
    a line, or a hub data set id; without it the test part of the run's, or else of the
    task's own
    """


def evaluate(options: EvalOptions) -> None:
    """Print and write the metrics of a run."""
    import json

    load.use_compilation_cache()
    done = measure.evaluate_run(
        options.run, options.task, rows=options.rows, samples=options.samples, data=options.data
    )
    outputs = done.pop("outputs")
    files.write_atomically(
        options.run / "eval.jsonl",
        "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in outputs),
    )
    files.write_atomically(options.run / "eval.json", json.dumps(done, indent=1) + "\n")
    for name, x in done.items():
        if isinstance(x, list):
            print(
                f"{name}: {x[0]:.3f} (95 % interval {x[1]:.3f} to {x[2]:.3f} over {done['test_rows']} examples)"
            )
        elif name.startswith("pass@"):
            print(f"{name}: {x:.3f}")
