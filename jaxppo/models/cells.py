"""Recurrent cells, GRU and LSTM, and a layer of them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo import kernels
from jaxppo.models.layers import Linear

State = tuple[Array, ...]


def gru(state: State, gates: Float[Array, "B K"], recurrent: Float[Array, "B K"]) -> State:
    """r, z = σ(x + h);  n = tanh(xₙ + r hₙ);  h' = (1 − z) n + z h."""
    (hidden,) = state
    reset, update, new = jnp.split(gates, 3, -1)
    reset_h, update_h, new_h = jnp.split(recurrent, 3, -1)
    r, z = jax.nn.sigmoid(reset + reset_h), jax.nn.sigmoid(update + update_h)
    return ((1 - z) * jnp.tanh(new + r * new_h) + z * hidden,)


def lstm(state: State, gates: Float[Array, "B K"], recurrent: Float[Array, "B K"]) -> State:
    """i, f, o = σ(x + h);  c' = f c + i tanh(xᵍ + hᵍ);  h' = o tanh(c')."""
    _, cell = state
    i, f, g, o = jnp.split(gates + recurrent, 4, -1)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


# kind -> (cell, number of gates, number of state arrays)
CELLS = {"gru": (gru, 3, 1), "lstm": (lstm, 4, 2)}


def init_state(kind: str, rows: int, width: int) -> State:
    """The state before the first token: float32 zeros, whatever the compute type."""
    return tuple(jnp.zeros((rows, width), jnp.float32) for _ in range(CELLS[kind][2]))


class Layer(nn.Module):
    """One recurrent layer; the gates' input terms are computed all at once."""

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
            gates, attends = inputs
            new = cell(state, gates, kernels.matmul(state[0], kernel, self.dtype))
            state = jax.tree.map(lambda n, o: jnp.where(attends[:, None], n, o), new, state)
            return state, state[0]

        state, out = jax.lax.scan(token, state, (gates.swapaxes(0, 1), attend.swapaxes(0, 1)))
        return out.swapaxes(0, 1), state
