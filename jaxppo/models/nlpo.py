"""NLPO: sampling within the nucleus of a lagged copy of the policy."""

import jax
import jax.numpy as jnp

from jaxppo.config import Config
from jaxppo.types import TrainState


def lag(state: TrainState, config: Config) -> dict:
    """The state's statistics; with NLPO's mask its lagged policy is copied afresh every
    `mask_every` steps. It lives there and not in `frozen`, so that a resumed run has
    the one that it had.
    """
    if config.mask_top_p >= 1:
        return state.statistics
    fresh = state.step % config.mask_every == 0
    lagged = jax.tree.map(
        lambda new, old: jnp.where(fresh, new, old), dict(state.params), state.statistics["lagged"]
    )
    return {**state.statistics, "lagged": lagged}
