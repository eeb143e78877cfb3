"""Policies that see the last few tokens alone: causal convolutions, and an MLP over a
window. Their memory is the last inputs.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxppo.models import language_model
from jaxppo.models.layers import Linear, Norm
from jaxppo.models.shapes import ModelConfig
from jaxppo.types import Model


def windows(
    x: Float[Array, "B L D"], attend: Bool[Array, "B L"], before: Float[Array, "B W D"]
) -> tuple[Float[Array, "B L K"], Float[Array, "B W D"]]:
    """(for each token itself and the W inputs before it, side by side, the last W
    inputs). Padding counts as zeros.

    A convolution as one matrix product over them: XLA's own is many times slower on a
    CPU.
    """
    length = x.shape[1]
    seen = jnp.concatenate([before, x * attend[..., None]], 1)
    shifted = [seen[:, k : k + length] for k in range(before.shape[1] + 1)]
    return jnp.concatenate(shifted, -1), seen[:, length:]


class Convolution(nn.Module):
    """Layers of causal convolution of width `kernel`, gated, each added to its input
    (Dauphin et al. 2017, https://arxiv.org/abs/1612.08083).
    """

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, attend, memory):
        c, new = self.config, []
        for number, before in enumerate(memory):
            normed = Norm(c.norm, c.norm_eps, name=f"norm_{number}")(x)
            beside, before = windows(normed, attend, before)
            value = Linear(c.width, True, self.dtype, name=f"value_{number}")(beside)
            gate = Linear(c.width, True, self.dtype, name=f"gate_{number}")(beside)
            x = x + Linear(c.width, True, self.dtype, name=f"out_{number}")(
                value * nn.sigmoid(gate)
            )
            new.append(before)
        return x, tuple(new)


class Window(nn.Module):
    """The embeddings of the last `kernel` tokens side by side, then an MLP (Bengio et
    al. 2003, https://jmlr.org/papers/v3/bengio03a.html).
    """

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, attend, memory):
        c = self.config
        beside, before = windows(x, attend, memory[0])
        x = x + Linear(c.width, True, self.dtype, name="input")(beside)
        for number in range(c.num_layers):
            normed = Norm(c.norm, c.norm_eps, name=f"norm_{number}")(x)
            wide = nn.silu(Linear(c.mlp_width, True, self.dtype, name=f"up_{number}")(normed))
            x = x + Linear(c.width, True, self.dtype, name=f"down_{number}")(wide)
        return x, (before,)


def make(config: ModelConfig, *, dtype: str = "float32", **options) -> Model:
    """The net of `config` (kind convolution or window) as pure functions; options as in
    `language.wrap`.
    """
    bodies: dict[str, Any] = {"convolution": Convolution, "window": Window}
    layers = config.num_layers if config.kind == "convolution" else 1

    def init_memory(batch, dtype):
        del dtype
        return tuple(
            jnp.zeros((batch, config.kernel - 1, config.width), jnp.float32) for _ in range(layers)
        )

    return language_model.wrap(
        config, bodies[config.kind](config, jnp.dtype(dtype)), init_memory, dtype=dtype, **options
    )
