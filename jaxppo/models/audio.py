"""What a policy hears beside its tokens: an encoder of a recording's features, and
attention to it from the decoder's states.

After Listen, Attend and Spell (Chan et al. 2016, https://arxiv.org/abs/1508.01211): the
recording is made four times shorter and read in both directions; each of the decoder's
states looks at all of it by dot products (Luong et al. 2015,
https://arxiv.org/abs/1508.04025). Frames that are padding, behind the real ones, change
nothing.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxppo import kernels
from jaxppo.errors import UserError
from jaxppo.models import cells
from jaxppo.models.attention import attend
from jaxppo.models.layers import Norm, dropped
from jaxppo.models.shapes import ModelConfig


class Heard(NamedTuple):
    """An encoded recording, as the decoder looks at it: S = F / 4."""

    keys: Float[Array, "B H S D"]
    values: Float[Array, "B H S D"]
    real: Bool[Array, "B S"]


def check(config: ModelConfig, context: Any, heard: Any) -> None:
    """Whether there is what the policy reads, or has read, and nothing else, while
    tracing. Raises UserError.
    """
    if not config.context_width:
        if context is not None:
            raise UserError(
                f"this {config.kind} policy reads no context: make it with a context_width, or rows without"
            )
    elif context is None:
        if heard is None:
            raise UserError(
                'this policy reads a recording: its rows need "context" and "context_length" in their extra'
            )
    elif context[0].shape[2] != config.context_width:
        raise UserError(
            f"the context has {context[0].shape[2]} numbers a frame, but the policy reads {config.context_width}"
        )
    elif 0 < config.context_length < context[0].shape[1]:
        raise UserError(
            f"the context has {context[0].shape[1]} frames, but the policy takes {config.context_length}"
        )


def halved(
    x: Float[Array, "B F M"], real: Bool[Array, "B F"]
) -> tuple[Float[Array, "B G K"], Bool[Array, "B G"]]:
    """(every second frame between its neighbours, side by side, G = F / 2 rounded up,
    which of them are real): the inputs of a convolution of width 3 and stride 2.
    Padding counts as zeros.
    """
    odd = x.shape[1] % 2
    x = jnp.pad(jnp.where(real[..., None], x, 0.0), ((0, 0), (1, odd), (0, 0)))
    real = jnp.pad(real, ((0, 0), (0, odd)))
    return jnp.concatenate([x[:, :-1:2], x[:, 1::2], x[:, 2::2]], -1), real[:, ::2]


class Dense(nn.Module):
    """y = x W + b, of a size that passes the inputs' on: the standard deviation .02 of
    language models would hush a recording.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return kernels.matmul(x, kernel, self.dtype) + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def by_heads(x: Float[Array, "B L D"], heads: int) -> Float[Array, "B H L K"]:
    """The width cut into heads, each of which has a block of its own."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


class Encoder(nn.Module):
    """Features -> two strided convolutions (each a matrix product: `windows.windows`)
    -> a recurrent layer there and back.
    """

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, features, lengths, dropout_key=None) -> Heard:
        c = self.config
        x, real = (
            features.astype(jnp.float32),
            jnp.arange(features.shape[1], dtype=jnp.int32)[None] < lengths[:, None],
        )
        for number in range(2):
            x, real = halved(x, real)
            x = nn.silu(Dense(c.width, self.dtype, name=f"convolution_{number}")(x))
        x = dropped(x, c.dropout, dropout_key, 2)
        normed = Norm(c.norm, c.norm_eps, name="norm")(x)
        kind = c.kind if c.kind in cells.CELLS else "gru"
        rest = tuple(
            jnp.zeros((x.shape[0], c.width), jnp.float32) for _ in range(cells.CELLS[kind][2])
        )
        there, _ = cells.Layer(kind, self.dtype, name="there")(normed, real, rest)
        # From the end, where the padding is: it leaves the state as it is, so that each
        # row begins at its own last frame.
        back, _ = cells.Layer(kind, self.dtype, name="back")(normed[:, ::-1], real[:, ::-1], rest)
        x = x + Dense(c.width, self.dtype, name="both")(jnp.concatenate([there, back[:, ::-1]], -1))
        x = dropped(Norm(c.norm, c.norm_eps, name="final_norm")(x), c.dropout, dropout_key, 3)
        keys, values = (
            by_heads(Dense(c.width, self.dtype, name=name)(x), c.num_heads) for name in ("k", "v")
        )
        return Heard(keys.astype(self.dtype), values.astype(self.dtype), real)


class Listening(nn.Module):
    """Attention from each state to the recording, then an MLP, each added to its input.
    A row without a recording sees the mean of its padding, which is the same for
    all.
    """

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, heard: Heard):
        c = self.config
        dense = lambda name, x, width=c.width: Dense(width, self.dtype, name=name)(x)
        q = by_heads(
            dense("q", Norm(c.norm, c.norm_eps, name="attention_norm")(x)), c.num_heads
        ).astype(self.dtype)
        visible = jnp.broadcast_to(
            heard.real[:, None], (x.shape[0], x.shape[1], heard.real.shape[1])
        )
        seen = attend(q, heard.keys, heard.values, visible).swapaxes(1, 2).reshape(x.shape)
        x = x + dense("o", seen)
        wide = nn.silu(dense("up", Norm(c.norm, c.norm_eps, name="mlp_norm")(x), c.mlp_width))
        return x + dense("down", wide)
