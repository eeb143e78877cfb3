"""`jaxppo train`: train on your own prompts with your own reward, without a script."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from jaxppo import train as door
from jaxppo.config import RunConfig
from jaxppo.data import table
from jaxppo.errors import UserError, first_line


@dataclass(frozen=True)
class TrainOptions(RunConfig):
    """Train a language model on your prompts with your reward.

    $ jaxppo train --data prompts.jsonl --reward mine.py:reward
    $ jaxppo train --data prompts.jsonl --reward mine.py:right mine.py:short
    $ jaxppo train --data prompts.jsonl --reward mine.py:reward --algorithm grpo

    prompts.jsonl has an object a line: {"prompt": "..."}, for a chat model {"prompt":
    [{"role": "user", "content": "..."}]}, and any further columns. mine.py has a
    function reward(prompt, response, **columns) that returns a number, or a dict of
    named numbers; higher is better.
    """

    RANGES: ClassVar = {
        **dict.fromkeys(("prompt_length", "max_bad_lines"), "[0, inf)"),
        "weights": "(-inf, inf)",
    }

    name: str = "train"
    prompt_length: int = 0
    """tokens of a prompt; 0 = those of the longest prompt"""
    dtype: str = "bfloat16"
    data: str = ""
    """prompts: a .jsonl file, {"prompt": ...} a line with any further columns"""
    reward: tuple[str, ...] = ()
    """FILE.py:FUNCTION, one or more; several are named after their functions and added
    up. Without it: the score of --reward-model, or --teacher alone"""
    weights: tuple[tuple[str, float], ...] = ()
    """weights of named scores, such as: right 1 short 0.5; 1 by default"""
    validation: str = ""
    """held-out prompts, a .jsonl file; their reward chooses the best checkpoint"""
    too_long: Literal["drop", "last", "error"] = "drop"
    """a prompt of more than prompt_length tokens is dropped, cut to its last tokens, or
    an error
    """
    bad_lines: Literal["strict", "skip"] = "strict"
    """a line of --data without a prompt is an error, or is skipped"""
    max_bad_lines: int = 10
    """most lines that may be skipped"""


def train(options: TrainOptions) -> None:
    """Train, and print where the run is."""
    if not options.data:
        raise UserError('--data is missing; give a .jsonl file of {"prompt": "..."} lines')
    rewards = {name.rpartition(":")[2]: load_function(name) for name in options.reward}
    if len(rewards) < len(options.reward):
        raise UserError("--reward: two functions have the same name; rename one")
    reward: Callable | Mapping[str, Callable] | None = rewards or None
    if len(rewards) == 1 and not rewards.keys() & dict(options.weights).keys():
        reward = next(iter(rewards.values()))
    run = door.train_on(
        options,
        table.read_file(options.data, bad_lines=options.bad_lines, max_bad=options.max_bad_lines),
        reward,
        weights=dict(options.weights),
        validation=Path(options.validation) if options.validation else None,
        too_long=options.too_long,
    )
    print(f"written: {run.folder}; try: jaxppo sample {run.folder} PROMPT")


def load_function(name: str) -> Any:
    """Load the function of FILE.py:FUNCTION. Raises UserError."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not file or not function.isidentifier():
        raise UserError(f"--reward {name!r}: give FILE.py:FUNCTION, such as mine.py:reward")
    if not path.is_file():
        raise UserError(f"--reward {name}: there is no file {path}")
    found = getattr(load_file(path.absolute()), function, None)
    if not callable(found):
        raise UserError(f"--reward {name}: {path} has no function {function}")
    return found


@cache
def load_file(path: Path) -> ModuleType:
    """Run a Python file, once a process. Raises UserError."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--reward: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where workers of a RewardPool look for it
    sys.path.insert(0, str(path.parent))  # and the file's own imports
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit() would end the command in silence
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--reward: {path} cannot be run ({reason})") from error
    return module
