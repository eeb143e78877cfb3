"""Residual layers of GRU (https://arxiv.org/abs/1406.1078) or LSTM
(https://doi.org/10.1162/neco.1997.9.8.1735). Padding does not change the state.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxppo.models import language_model
from jaxppo.models.cells import Layer, init_state
from jaxppo.models.layers import Norm
from jaxppo.models.shapes import ModelConfig
from jaxppo.types import Model


class Recurrent(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, attend, memory):
        c, new = self.config, []
        for number, state in enumerate(memory):
            normed = Norm(c.norm, c.norm_eps, name=f"norm_{number}")(x)
            out, state = Layer(c.kind, self.dtype, name=f"layers_{number}")(normed, attend, state)
            x = x + out
            new.append(state)
        return x, tuple(new)


def make(config: ModelConfig, *, dtype: str = "float32", **options) -> Model:
    """The model of kind gru or lstm; options as in `language_model.from_body`."""

    def init_memory(batch):
        return tuple(init_state(config.kind, batch, config.width) for _ in range(config.num_layers))

    body = Recurrent(config, jnp.dtype(dtype))
    return language_model.from_body(config, body, init_memory, dtype=dtype, **options)
