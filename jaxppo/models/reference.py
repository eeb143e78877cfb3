"""A reference that moves: it becomes the policy every so many steps, or follows it as
an exponential average (https://arxiv.org/abs/2404.09656). What moves are the trained
parameters, with adapters these alone. They are in `TrainState.statistics`, so that
checkpoints hold them; `TrainState.frozen` keeps the start.
"""

import jax
import jax.numpy as jnp

from jaxppo.config import Config
from jaxppo.models import lora
from jaxppo.types import Params, PyTree, TrainState

NAME = "reference"


def init_moving(params: Params, config: Config) -> PyTree:
    """The first reference as an entry of the statistics; empty if it stays."""
    if not (config.reference_every or config.reference_decay):
        return {}
    return {NAME: jax.tree.map(jnp.copy, dict(params))}


def update_moving(state: TrainState, statistics: PyTree, config: Config) -> PyTree:
    """The statistics with the reference of this step: the policy, every
    `reference_every` steps; else d · reference + (1 − d) · policy with d =
    `reference_decay`, or as it was.
    """
    if NAME not in statistics:
        return statistics
    decay = config.reference_decay or 1.0
    every = config.reference_every
    fresh = state.step % every == 0 if every else jnp.zeros((), bool)
    move = lambda own, ref: jnp.where(fresh, own, decay * ref + (1 - decay) * own)
    return {**statistics, NAME: jax.tree.map(move, dict(state.params), statistics[NAME])}


def with_moving(frozen: Params, statistics: PyTree) -> Params:
    """The frozen trees with the reference of this step, if it moves."""
    if NAME not in statistics:
        return frozen
    return {**frozen, "reference": lora.merge(frozen["base"], statistics[NAME])}
