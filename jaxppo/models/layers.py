"""Shared layers: linear maps with adapters, norms, dropout, and the value head."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import kernels
from jaxppo.models import layout
from jaxppo.models.int8 import SCALE


class Adapters(NamedTuple):
    """The adapters of a network: of this rank, on these linear layers of each block,
    scaled by alpha / rank. `gather_late`: see `Linear`.
    """

    rank: int = 0
    alpha: float = 16.0
    on: tuple[str, ...] = ()
    gather_late: bool = False

    def linear(self, name: str, features: int, use_bias: bool, dtype: Any) -> "Linear":
        """The layer of this name, with an adapter if it is one of `on`."""
        rank = self.rank if name in self.on else 0
        return Linear(
            features, use_bias, dtype, rank, self.alpha, gather_late=self.gather_late, name=name
        )


class Linear(nn.Module):
    """y = x W + b, plus (alpha / rank) (x A) B if the parameters hold adapters. W may
    be in 8 bits (`int8.quantise`). `gather_late`: as `layout.gather_after` has it.
    """

    features: int
    use_bias: bool = False
    dtype: Any = jnp.float32
    rank: int = 0
    alpha: float = 16.0
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    gather_late: bool = False

    @nn.compact
    def __call__(self, x):
        width, zeros = x.shape[-1], nn.initializers.zeros
        kernel = self.param("kernel", self.kernel_init, (width, self.features), jnp.float32)
        if self.gather_late:
            x, kernel = layout.gather_after(x, kernel)
        if self.has_variable("params", SCALE):
            y = kernels.matmul_int8(x, kernel, self.get_variable("params", SCALE), self.dtype)
        else:
            y = kernels.matmul(x, kernel, self.dtype)
        # The reference policy is the same module without adapters in its parameters.
        if self.rank and (self.is_initializing() or self.has_variable("params", "lora_a")):
            normal = nn.initializers.normal(width**-0.5)
            a = self.param("lora_a", normal, (width, self.rank), jnp.float32)
            b = self.param("lora_b", zeros, (self.rank, self.features), jnp.float32)
            low_rank = kernels.matmul(kernels.matmul(x, a, self.dtype), b, self.dtype)
            y = y + low_rank * (self.alpha / self.rank)
        if self.use_bias:
            y = y + _last_axis(self.param("bias", zeros, (self.features,), jnp.float32), y)
        return y


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with bias, in float32 over the last dimension. `kind` as in
    `ModelConfig.norm`.
    """

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x):
        vector = lambda name, init: self.param(name, init, (x.shape[-1],), jnp.float32)
        plus_one = self.kind == "rms_plus_one"
        first = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = _last_axis(vector("scale", first), x)
        scale = scale + 1 if plus_one else scale
        if self.kind != "layer":
            return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps) * scale
        bias = _last_axis(vector("bias", nn.initializers.zeros), x)
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.eps) * scale + bias


class Value(nn.Module):
    """A linear value head, zero at the start: the first advantages are the returns."""

    @nn.compact
    def __call__(self, hidden):
        kernel = self.param("kernel", nn.initializers.zeros, (hidden.shape[-1], 1), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (), jnp.float32)
        return (hidden @ kernel)[..., 0] + bias


def dropout(x: Any, rate: float, key: Array | None, number: int) -> Any:
    """x with a share `rate` set to 0 (https://jmlr.org/papers/v15/srivastava14a.html);
    x itself without a key. `number` tells apart the calls that share a key.
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0.0)


def _last_axis(vector: Array, x: Array) -> Array:
    """[D] as [1 ... 1 D], with the dimensions of x."""
    return jnp.reshape(vector, (1,) * (x.ndim - 1) + (-1,))
