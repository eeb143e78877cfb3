"""Ids without a token: the rows with which an embedding is padded, and holes of the
tokenizer. No text has them, so they are never sampled.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxppo.types import Model

# finite: 0 times it is 0, in entropy, divergences and gradients
LOWEST = -1e30


def without(model: Model, missing: Int[np.ndarray, "m"]) -> Model:
    """The model with the logits of these ids at −1e30, where their probability is 0 and
    they have no gradient; the model itself if there are none.
    """
    if not len(missing):
        return model

    def logits(params, hidden):
        whole = model.logits(params, hidden)
        known = ~np.isin(np.arange(whole.shape[-1]), missing)
        return jnp.where(jnp.broadcast_to(known, whole.shape), whole, LOWEST)

    return model._replace(logits=logits)
