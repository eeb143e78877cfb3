"""Evaluate a supervised objective on held-out rows."""

import math
from collections.abc import Callable

import jax
import numpy as np

from jaxppo import supervised
from jaxppo.config import RunConfig
from jaxppo.data.rows import Rows
from jaxppo.parallel import sharding
from jaxppo.run.load import Policy
from jaxppo.supervised import Objective
from jaxppo.types import TrainState


def make_validation(
    config: RunConfig, policy: Policy, objective: Objective, rows: Rows
) -> Callable[[TrainState], dict[str, float]]:
    """Make `evaluate(state)` for `train.fit`: the objective's metrics, averaged over
    all rows.

    `score` is the accuracy if there is one; otherwise it is minus the loss, and there
    is a `perplexity`, exp(loss).
    """
    program = jax.jit(supervised.make_evaluation(policy.model, objective))
    size = max(config.batch_size // rows.unit, 1)

    def evaluate(state: TrainState) -> dict[str, float]:
        sums: dict[str, float] = {}
        total = 0.0
        for start in range(0, len(rows), size):
            part = rows.take(np.arange(start, min(start + size, len(rows))))
            with sharding.rows_on_mesh(state.params, part.all()) as batch:
                found, weight = program(state.params, state.frozen, batch)
            total += float(weight)
            sums = {name: sums.get(name, 0.0) + float(x) for name, x in found.items()}
        means = {name: x / total for name, x in sums.items()}
        if "accuracy" in means:
            return {**means, "score": means["accuracy"]}
        return {**means, "perplexity": math.exp(min(means["loss"], 80.0)), "score": -means["loss"]}

    return evaluate
