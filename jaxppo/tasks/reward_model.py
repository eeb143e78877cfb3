"""Train a reward model on preferences, from the policy's own checkpoint."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxppo import parallel, policy, supervised, train
from jaxppo.data import rows
from jaxppo.models import lora
from jaxppo.parallel import processes, sharding
from jaxppo.run import files, load, resume, validation
from jaxppo.run.policy import own_start
from jaxppo.run.sampler import Sample
from jaxppo.tasks import TaskConfig
from jaxppo.tasks.stages import supervised_settings
from jaxppo.types import Model


class RewardModel(NamedTuple):
    """A trained reward model and what it needs to score text."""

    model: Model
    params: Any
    encode: rows.Encode
    eos: int
    length: int
    longest: int  # tokens of a response
    accuracy: float  # on held-out pairs
    start: tuple[int, ...] = ()  # before each prompt

    def scores(self, samples: Sequence[Sample]) -> np.ndarray:
        """Score samples, [N]: the value at the last token."""
        pairs = [(sample.prompt, sample.response) for sample in samples]
        limits = {"eos": self.eos, "longest": self.longest, "start": self.start}
        read = rows.responses(pairs, self.encode, self.length, **limits)
        with sharding.rows_on_mesh(self.params, (read.tokens, read.mask)) as (tokens, mask):
            return np.asarray(processes.to_host(_last_value(self.model)(self.params, tokens, mask)))


@functools.cache
def _last_value(model: Model) -> Callable:
    return jax.jit(functools.partial(policy.last_value, model))


def rows_of_pairs(devices: int) -> int:
    """Return the rows of a batch: 32, or the next number that gives each device the
    same number of pairs.

    >>> [rows_of_pairs(devices) for devices in (1, 8, 16, 32, 12)]
    [32, 32, 32, 64, 48]
    """
    return -(-32 // (2 * devices)) * 2 * devices


def train_reward_model(
    options: TaskConfig, pairs: list[tuple[str, str, str]], *, name: str, seed: int, steps: int
) -> RewardModel:
    """Train a Bradley-Terry model on (prompt, better, worse), as the run <runs>/<name>.

    The best checkpoint on a held-out tenth of the pairs is returned. An interrupted run
    is resumed, and a finished one is not trained again.
    """
    place = Path(options.runs) / name
    settings = dataclasses.replace(
        options,
        name=name,
        batch_size=rows_of_pairs(parallel.row_shards(options.parallel, options.mesh)),
        lr=min(options.sft_lr, 5e-4),
        value_loss="mse",
        critic="shared",
        value_init="zero",
        patience=0,
        seed=seed,
        **supervised_settings(place, steps),
    )
    resume.check_early(settings)
    settings, policy = load.load_policy(settings)
    encode, eos = policy.tokenizer.encode, policy.tokenizer.eos_id
    length, longest = settings.length, settings.response_length
    start = own_start(settings, policy.tokenizer)
    prompts = [prompt or better + worse for prompt, better, worse in pairs]
    training, held_out = (
        rows.preferences(
            [pairs[i] for i in part], encode, length, eos=eos, longest=longest, start=start
        )
        for part in rows.train_validation_split(prompts, 0.1)
    )
    objective = supervised.bradley_terry(policy.model, centring=0.01)
    evaluate = validation.make_validation(settings, policy, objective, held_out)
    files.run_folder(settings.runs, name, resume=settings.resume)
    state = train.fit(settings, policy, objective, training, folder=place, evaluate=evaluate)
    best = load.restore_best(place, state)
    params = lora.merge(policy.frozen["base"], best.params)
    accuracy = evaluate(best)["accuracy"]
    return RewardModel(policy.model, params, encode, eos, length, longest, accuracy, start)
