"""An objective's numbers on rows that are held out, while a supervised run goes on."""

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


def validate_objective(
    config: RunConfig, policy: Policy, objective: Objective, rows: Rows
) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) for `train.fit`: means over all rows of the loss and what else
    the objective tells; of a language model also `perplexity`, exp(loss). `score`,
    higher is better, is the accuracy where there is one, else minus the loss.
    """
    program = jax.jit(supervised.make_evaluation(policy.model, objective))
    most = max(config.batch_size // rows.unit, 1)

    def evaluate(state: TrainState) -> dict[str, float]:
        sums: dict[str, float] = {}
        total = 0.0
        for start in range(0, len(rows), most):
            part = rows.take(np.arange(start, min(start + most, len(rows))))
            with sharding.rows_on_mesh(state.params, part.all()) as batch:
                found, weight = program(state.params, state.frozen, batch)
            total += float(weight)
            sums = {name: sums.get(name, 0.0) + float(x) for name, x in found.items()}
        means = {name: x / total for name, x in sums.items()}
        if "accuracy" in means:
            return {**means, "score": means["accuracy"]}
        return {**means, "perplexity": math.exp(min(means["loss"], 80.0)), "score": -means["loss"]}

    return evaluate
