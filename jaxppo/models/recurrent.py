"""Recurrent policies: layers of GRU (Cho et al. 2014, https://arxiv.org/abs/1406.1078) or LSTM (Hochreiter & Schmidhuber 1997,
doi:10.1162/neco.1997.9.8.1735), each added to its input. Padding leaves the state as it was."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo import kernels
from jaxppo.config import ModelConfig
from jaxppo.models import language
from jaxppo.models.layers import Linear, Norm
from jaxppo.types import Model


def gru(state: tuple[Array, ...], gates: Float[Array, "B K"], recurrent: Float[Array, "B K"]) -> tuple[Array, ...]:
    """r, z = σ(x + h);  n = tanh(xₙ + r hₙ);  h' = (1 − z) n + z h.  `gates` are the input's parts, `recurrent` the state's."""
    (hidden,) = state
    reset, update, new = jnp.split(gates, 3, -1)
    reset_h, update_h, new_h = jnp.split(recurrent, 3, -1)
    r, z = jax.nn.sigmoid(reset + reset_h), jax.nn.sigmoid(update + update_h)
    return ((1 - z) * jnp.tanh(new + r * new_h) + z * hidden,)


def lstm(state: tuple[Array, ...], gates: Float[Array, "B K"], recurrent: Float[Array, "B K"]) -> tuple[Array, ...]:
    """i, f, o = σ(x + h);  c' = f c + i tanh(xᵍ + hᵍ);  h' = o tanh(c')."""
    _, cell = state
    i, f, g, o = jnp.split(gates + recurrent, 4, -1)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


CELLS = {"gru": (gru, 3, 1), "lstm": (lstm, 4, 2)}  # (the cell, its gates, its arrays of state)


class Layer(nn.Module):
    """One layer over time; the input's part of the gates is computed for all tokens at once."""

    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, x, attend, state):
        cell, number, _ = CELLS[self.kind]
        width = x.shape[-1]
        gates = Linear(number * width, True, self.dtype, name="input")(x)
        init = nn.initializers.orthogonal()
        kernel = self.param("recurrent", init, (width, number * width), jnp.float32)

        def token(state, inputs):
            gates, here = inputs
            new = cell(state, gates, kernels.matmul(state[0], kernel, self.dtype))
            state = jax.tree.map(lambda n, o: jnp.where(here[:, None], n, o), new, state)
            return state, state[0]

        state, out = jax.lax.scan(token, state, (gates.swapaxes(0, 1), attend.swapaxes(0, 1)))
        return out.swapaxes(0, 1), state


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
    """The recurrent net of `config` (kind gru or lstm) as pure functions; options as in `language.wrap`."""

    def init_memory(batch, dtype):
        del dtype  # what is added to for long stays float32
        _, _, arrays = CELLS[config.kind]
        zeros = lambda: jnp.zeros((batch, config.width), jnp.float32)
        return tuple(tuple(zeros() for _ in range(arrays)) for _ in range(config.num_layers))

    return language.wrap(config, Recurrent(config, jnp.dtype(dtype)), init_memory, dtype=dtype, **options)
