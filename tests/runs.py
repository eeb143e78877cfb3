"""A run small enough for every test, its prompts, its folder, and how a script is run."""

import importlib.util
import json
import os
import sys
from pathlib import Path

from jaxppo import cli
from jaxppo.commands.train import TrainOptions, train
from jaxppo.config import RunConfig
from jaxppo.run import files
from jaxppo.run.settings import to_dict

REPOSITORY = Path(__file__).parents[1]
# metrics that differ between two runs with the same numbers
TIMING_KEYS = ("seconds", "tokens_per_second", "compile_seconds", "goodput", "mfu")

RUN = RunConfig(
    tiny=True,
    batch_size=4,
    prompt_length=4,
    response_length=3,
    minibatches=2,
    steps=4,
    save_every=2,
    eval_every=3,
    lora=2,
    lr=1e-2,
    parallel="jit",
    layout="dense",  # a program of half the size
)
TEXTS = ["one", "two", "four", "x", "seven", "it", "ab"]
# settings of `train.policy` for as small a run
SMALL = {
    "tiny": True,
    "steps": 2,
    "batch_size": 8,
    "response_length": 3,
    "parallel": "jit",
    "layout": "dense",
    "algorithm": "grpo",
    "group_size": 4,
    "minibatches": 2,
}


def environment(**own: str) -> dict[str, str]:
    """That of a fresh process: no eight devices; it compiles as the suite does."""
    kept = {k: x for k, x in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    return kept | {"PYTHONPATH": str(REPOSITORY), **own}


def load_script(script: str):
    """Import a script, and return the module."""
    spec = importlib.util.spec_from_file_location(
        script, REPOSITORY / "experiments" / f"{script}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_script(script: str, *args: str) -> None:
    """Call a script's main with options from a command line, in this process."""
    module = load_script(script)
    config = next(
        x for x in vars(module).values() if isinstance(x, type) and x.__module__ == script
    )
    # one device of the suite's eight, and padded rows: a program of half the size
    own = {"parallel": "jit", "layout": "dense"}
    small = [x for name in own if hasattr(config, name) for x in (f"--{name}", own[name])]
    cli.script(module.main, config, args=[*args, *small])


def short_words(prompt: str, response: str) -> float:
    """A reward: minus the mean length of the words."""
    words = response.split()
    return -sum(map(len, words)) / len(words) if words else -10.0


def run_train(*args: str) -> None:
    """Call `jaxppo train` in this process, with `short_words` unless there is a reward."""
    given = {"--reward", "--reward-model", "--teacher"} & {*args}
    reward = [] if given else ["--reward", f"{__file__}:short_words"]
    small = ["--parallel", "jit", "--layout", "dense"]
    cli.script(train, TrainOptions, args=[*args, *reward, *small])


def two_prompts(folder: Path) -> Path:
    """Write a file of prompts for `jaxppo train`."""
    path = folder / "prompts.jsonl"
    path.write_text('{"prompt": "The film"}\n{"prompt": "I went"}\n')
    return path


def rows_without_times(folder: Path) -> list[dict]:
    """The metrics of a run that are those of any run with its settings."""
    rows = files.read_jsonl(folder / "metrics.jsonl")
    return [{k: x for k, x in row.items() if k not in TIMING_KEYS} for row in rows]


ROW = {"reward": 0.5, "skipped": 0.0, "barren_steps": 0.0}


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def a_run(folder: Path, config: RunConfig | None = None, *, steps: int = 3, **files: str) -> Path:
    """A run's folder with so many steps; `files` by their names with _ for the dot."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(to_dict(config or RunConfig(name=folder.name, steps=steps)))
    )
    (folder / "metrics.jsonl").write_text(lines(*({"step": k, **ROW} for k in range(1, steps + 1))))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder
