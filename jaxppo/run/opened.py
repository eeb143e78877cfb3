"""A run on disk, from Python: its metrics, responses, episodes and exports."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxppo.config import RunConfig
from jaxppo.data import table
from jaxppo.data.prompts import format_prompt, start_token
from jaxppo.environments.play import Episode
from jaxppo.run import episodes, files, load
from jaxppo.run.episodes import World
from jaxppo.run.option_names import in_python
from jaxppo.run.policy import Policy
from jaxppo.run.sampler import Sampler
from jaxppo.run.settings import read_config
from jaxppo.types import TrainState


class Run:
    """A run on disk: its metrics, and its policy at any checkpoint that was kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._loaded: dict[Any, tuple] = {}

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def config(self) -> RunConfig:
        """The settings."""
        return read_config(RunConfig, self.folder / "config.json")

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """Every metric by name, one value a step; NaN at steps that have none."""
        rows = files.read_metrics(self.folder)
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}

    @in_python()
    def sample(
        self,
        prompts: Any,
        *,
        checkpoint: str | int = "best",
        raw: bool = False,
        samples: int = 1,
        seed: int = 0,
        greedy: bool = False,
    ) -> list[str]:
        """Sample responses to prompts of any form that `train.policy` takes, or to one
        text (a `str` is no file): `samples` to each, one after another. Texts are put
        into the run's `prompt_format`. A prompt that is too long loses its beginning.

        Args:
          checkpoint: "best" by validation or training reward, "newest", or a step.
          raw: the weights of that step, not their average (`ema_decay`).
        """
        config, policy, state = self._load(checkpoint=checkpoint, raw=raw)
        columns = table.read_columns([prompts] if isinstance(prompts, str) else prompts)
        rows = [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]
        asked = [
            format_prompt(config, row) if isinstance(row["prompt"], str) else row["prompt"]
            for row in rows
        ]
        columns = {"prompt": [x for x in asked for _ in range(samples)]}
        encoded = table.encode_columns(
            columns,
            policy.tokenizer,
            config.prompt_length,
            too_long="last",
            start=start_token(config, policy.tokenizer),
        )
        sampler = Sampler(config, policy, rows=min(64, len(encoded.tokens)), greedy=greedy)
        return [found.response for found in sampler(state, encoded, seed=seed)]

    @in_python()
    def play(
        self,
        environment: World,
        prompts: Any,
        *,
        checkpoint: str | int = "best",
        raw: bool = False,
        seed: int = 0,
        greedy: bool = False,
    ) -> list[Episode]:
        """Play an episode on each prompt. The environment and the columns of the
        prompts are as in training, the other arguments those of `sample`.
        """
        config, policy, state = self._load(checkpoint=checkpoint, raw=raw)
        encoded = episodes.encode(config, policy, table.read_columns(prompts), environment)
        world = episodes.on_tokens(environment, policy)
        return episodes.play(config, policy, world, state, encoded, seed=seed, greedy=greedy)

    def _load(self, **which: Any) -> tuple[RunConfig, Policy, TrainState]:
        """The run at a checkpoint; the last one is kept."""
        key = tuple(which.values())
        if key not in self._loaded:
            self._loaded = {key: load.restore(self.folder, **which)}
        return self._loaded[key]

    @in_python()
    def export(self, folder: str | Path, **options: Any) -> Path:
        """Write the model as `jaxppo export` does, and return the folder. `options`:
        checkpoint, raw, dtype, adapter.
        """
        # commands stand above this module in the order of imports
        export = importlib.import_module("jaxppo.commands.export")
        export.export(export.ExportOptions(self.folder, Path(folder), **options))
        return Path(folder)
