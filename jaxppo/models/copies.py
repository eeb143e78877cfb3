"""Copies of the trained parameters that follow the policy. They are in
`TrainState.statistics`, so that checkpoints hold them. With adapters they hold no base;
all that is trained is copied, also the value head and a critic, which only the average
needs.

lagged      masks tokens (`nlpo.py`, https://arxiv.org/abs/2210.01241)
reference   of the KL, if it moves (https://arxiv.org/abs/2404.09656);
            `TrainState.frozen` keeps the start
average     is evaluated, sampled and exported in the policy's place
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxppo.config import Config
from jaxppo.models import lora
from jaxppo.types import Params, PyTree, TrainState

BEFORE, AFTER = ("lagged", "reference"), ("average",)  # the update of a step


class Pace(NamedTuple):
    """How a copy follows the policy: it becomes the policy every so many steps (0 =
    never), else averages it with this decay (0 = stays).
    """

    every: int = 0
    decay: float = 0.0


def paces(config: Config) -> dict[str, Pace]:
    """The copies that the settings ask for."""
    found = {
        "lagged": Pace(every=config.mask_every if config.mask_top_p < 1 else 0),
        "reference": Pace(config.reference_every, config.reference_decay),
        "average": Pace(decay=config.ema_decay),
    }
    return {name: pace for name, pace in found.items() if pace.every or pace.decay}


def init_copies(params: Params, config: Config) -> PyTree:
    """The first copies, entries of the statistics, in float32."""
    copy = lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32))
    return {name: jax.tree.map(copy, dict(params)) for name in paces(config)}


def follow(state: TrainState, statistics: PyTree, config: Config, names: tuple) -> PyTree:
    """The statistics with the copies `names` of this step: the policy, every so many
    steps; else d · copy + (1 − d) · policy with the decay d, or as they were.
    """

    def move(pace: Pace, own, copy):
        own, moved = own.astype(copy.dtype), copy
        if pace.decay:
            moved = pace.decay * copy + (1 - pace.decay) * own
        return jnp.where(state.step % pace.every == 0, own, moved) if pace.every else moved

    one = lambda name, pace: jax.tree.map(
        lambda own, copy: move(pace, own, copy), dict(state.params), statistics[name]
    )
    found = {name: one(name, pace) for name, pace in paces(config).items() if name in names}
    return {**statistics, **found}


def with_reference(frozen: Params, statistics: PyTree) -> Params:
    """The frozen trees with the reference of this step, if it moves."""
    if "reference" not in statistics:
        return frozen
    return {**frozen, "reference": lora.merge(frozen["base"], statistics["reference"])}


def averaged(state: TrainState) -> TrainState:
    """The state with the average as its policy, if there is one."""
    return state.replace(params=state.statistics.get("average", state.params))
