"""Policies of the last few tokens: causal convolutions, and an MLP over a window."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxppo.models import language_model
from jaxppo.models.layers import Linear, Norm
from jaxppo.models.shapes import ModelConfig
from jaxppo.types import Model


def causal_windows(
    x: Float[Array, "B L D"], attend: Bool[Array, "B L"], before: Float[Array, "B W D"]
) -> tuple[Float[Array, "B L K"], Float[Array, "B W D"]]:
    """(each input behind the W before it, the last W inputs). What is not attended to
    is left out: it stands in no window, and has zeros as its own.
    """
    # One matrix product over windows: XLA's convolution is many times slower on a CPU.
    (rows, length, width), wide = x.shape, before.shape[1]
    rank = jnp.cumsum(attend, 1, dtype=jnp.int32) - 1
    to = jnp.where(attend, wide + rank, wide + length)
    own = jnp.arange(rows)[:, None]
    seen = jnp.concatenate([before, jnp.zeros((rows, length, width), before.dtype)], 1)
    seen = seen.at[own, to].set(x.astype(before.dtype), mode="drop")
    shifted = [seen[:, k : k + length] for k in range(wide + 1)]
    windows = jnp.take_along_axis(jnp.concatenate(shifted, -1), jnp.maximum(rank, 0)[..., None], 1)
    last = rank[:, -1:] + 1 + jnp.arange(wide)[None]
    return windows * attend[..., None], jnp.take_along_axis(seen, last[..., None], 1)


class Convolution(nn.Module):
    """Residual gated causal convolutions (https://arxiv.org/abs/1612.08083)."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, attend, memory):
        c, new = self.config, []
        for number, before in enumerate(memory):
            linear = lambda name, x, i=number: Linear(
                c.width, True, self.dtype, name=f"{name}_{i}"
            )(x)
            normed = Norm(c.norm, c.norm_eps, name=f"norm_{number}")(x)
            windows, before = causal_windows(normed, attend, before)
            gated = linear("value", windows) * nn.sigmoid(linear("gate", windows))
            x = x + linear("out", gated)
            new.append(before)
        return x, tuple(new)


class Window(nn.Module):
    """An MLP over embeddings (https://jmlr.org/papers/v3/bengio03a.html)."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, attend, memory):
        c = self.config
        windows, before = causal_windows(x, attend, memory[0])
        x = x + Linear(c.width, True, self.dtype, name="input")(windows)
        for number in range(c.num_layers):
            normed = Norm(c.norm, c.norm_eps, name=f"norm_{number}")(x)
            wide = nn.silu(Linear(c.mlp_width, True, self.dtype, name=f"up_{number}")(normed))
            x = x + Linear(c.width, True, self.dtype, name=f"down_{number}")(wide)
        return x, (before,)


def make(config: ModelConfig, *, dtype: str = "float32", **options) -> Model:
    """The model of kind convolution or window; options: `language_model.from_body`."""
    body: Any = Convolution if config.kind == "convolution" else Window
    layers = config.num_layers if config.kind == "convolution" else 1

    def init_memory(batch):
        shape = (batch, config.kernel - 1, config.width)
        return tuple(jnp.zeros(shape, jnp.float32) for _ in range(layers))

    body = body(config, jnp.dtype(dtype))
    return language_model.from_body(config, body, init_memory, dtype=dtype, **options)
