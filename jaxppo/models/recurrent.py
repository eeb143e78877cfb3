"""Recurrent policies: layers of GRU (Cho et al. 2014, https://arxiv.org/abs/1406.1078)
or LSTM (Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735), each added to
its input. Padding leaves the state as it was.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxppo.models import language_model
from jaxppo.models.cells import CELLS, Layer
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
    """The recurrent net of `config` (kind gru or lstm) as pure functions; options as in
    `language.wrap`.
    """

    def init_memory(batch, dtype):
        del dtype  # what is added to for long stays float32
        _, _, arrays = CELLS[config.kind]
        zeros = lambda: jnp.zeros((batch, config.width), jnp.float32)
        return tuple(tuple(zeros() for _ in range(arrays)) for _ in range(config.num_layers))

    return language_model.wrap(
        config, Recurrent(config, jnp.dtype(dtype)), init_memory, dtype=dtype, **options
    )
