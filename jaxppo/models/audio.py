"""An encoder of audio features, and the decoder's attention to it.

After Listen, Attend and Spell (https://arxiv.org/abs/1508.01211), with dot products
(https://arxiv.org/abs/1508.04025). Padding, after the real frames, has no effect.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxppo.errors import UserError
from jaxppo.models import cells
from jaxppo.models.attention import attend
from jaxppo.models.layers import Linear, Norm, dropout
from jaxppo.models.shapes import ModelConfig

# Keeps the scale of its inputs. The .02 of language models would make features vanish.
Dense = partial(Linear, use_bias=True, kernel_init=nn.initializers.lecun_normal())


class EncodedAudio(NamedTuple):
    """An encoded recording: S = F / 2."""

    keys: Float[Array, "B H S D"]
    values: Float[Array, "B H S D"]
    real: Bool[Array, "B S"]


def check_context(config: ModelConfig, context: Any, encoded: Any) -> None:
    """Raise UserError if the context is missing, unexpected, or of the wrong shape."""
    wrong = ""
    if context is None:
        if config.context_width and encoded is None:
            wrong = (
                'this policy reads a recording: its rows need "context" and "context_length" in'
                " extra"
            )
    elif not config.context_width:
        wrong = (
            f"this {config.kind} policy reads no context: give it a context_width, or use rows"
            " without context"
        )
    elif (width := context[0].shape[2]) != config.context_width:
        reads = config.context_width
        wrong = f"the context has {width} numbers a frame, but the policy reads {reads}"
    elif 0 < config.context_length < (frames := context[0].shape[1]):
        wrong = f"the context has {frames} frames, but the policy takes {config.context_length}"
    if wrong:
        raise UserError(wrong)


def downsample(
    x: Float[Array, "B F M"], real: Bool[Array, "B F"]
) -> tuple[Float[Array, "B G K"], Bool[Array, "B G"]]:
    """(every second frame with its two neighbours, G = F / 2 rounded up; which are
    real): the inputs of a convolution of width 3 and stride 2. Padding counts as zeros.
    """
    odd = x.shape[1] % 2
    x = jnp.pad(jnp.where(real[..., None], x, 0.0), ((0, 0), (1, odd), (0, 0)))
    real = jnp.pad(real, ((0, 0), (0, odd)))
    return jnp.concatenate([x[:, :-1:2], x[:, 1::2], x[:, 2::2]], -1), real[:, ::2]


def split_heads(x: Float[Array, "B L D"], heads: int) -> Float[Array, "B H L K"]:
    """The width cut into heads, each contiguous in memory."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


class Encoder(nn.Module):
    """A strided convolution, a bidirectional recurrent layer, keys and values."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, features, lengths, dropout_key=None) -> EncodedAudio:
        c, dense = self.config, partial(Dense, self.config.width, dtype=self.dtype)
        real = jnp.arange(features.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        x, real = downsample(features.astype(jnp.float32), real)
        x = dropout(nn.silu(dense(name="convolution")(x)), c.dropout, dropout_key, 2)
        normed = Norm(c.norm, c.norm_eps, name="norm")(x)
        kind = c.kind if c.kind in cells.CELLS else "gru"
        zeros = cells.init_state(kind, x.shape[0], c.width)
        there, _ = cells.Layer(kind, self.dtype, name="there")(normed, real, zeros)
        # Padding does not change the state, so each row begins at its own last frame.
        back, _ = cells.Layer(kind, self.dtype, name="back")(normed[:, ::-1], real[:, ::-1], zeros)
        x = x + dense(name="both")(jnp.concatenate([there, back[:, ::-1]], -1))
        x = dropout(Norm(c.norm, c.norm_eps, name="final_norm")(x), c.dropout, dropout_key, 3)
        keys, values = (
            split_heads(dense(name=name)(x), c.num_heads).astype(self.dtype) for name in ("k", "v")
        )
        return EncodedAudio(keys, values, real)


class AudioAttention(nn.Module):
    """Attention from each state to the recording, then an MLP, both residual."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, audio: EncodedAudio):
        c = self.config
        dense = lambda name, x, width=c.width: Dense(width, dtype=self.dtype, name=name)(x)
        normed = Norm(c.norm, c.norm_eps, name="attention_norm")(x)
        q = split_heads(dense("q", normed), c.num_heads).astype(self.dtype)
        visible = jnp.broadcast_to(audio.real[:, None], (*x.shape[:2], audio.real.shape[1]))
        seen = attend(q, audio.keys, audio.values, visible).swapaxes(1, 2).reshape(x.shape)
        x = x + dense("o", seen)
        wide = nn.silu(dense("up", Norm(c.norm, c.norm_eps, name="mlp_norm")(x), c.mlp_width))
        return x + dense("down", wide)
