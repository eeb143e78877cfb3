"""Layers that more than one architecture is made of: a linear map with adapters, norms,
and the value head.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import kernels


class Linear(nn.Module):
    """y = x W + b, plus (alpha / rank) (x A) B when the parameters hold adapters."""

    features: int
    use_bias: bool = False
    dtype: Any = jnp.float32
    rank: int = 0
    alpha: float = 16.0

    @nn.compact
    def __call__(self, x):
        kernel = self.param(
            "kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features), jnp.float32
        )
        y = kernels.matmul(x, kernel, self.dtype)
        # The reference policy is the same module without adapters in its parameters.
        if self.rank and (self.is_initializing() or self.has_variable("params", "lora_a")):
            a = self.param(
                "lora_a",
                nn.initializers.normal(x.shape[-1] ** -0.5),
                (x.shape[-1], self.rank),
                jnp.float32,
            )
            b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features), jnp.float32)
            y = y + kernels.matmul(kernels.matmul(x, a, self.dtype), b, self.dtype) * (
                self.alpha / self.rank
            )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
        return y


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with bias, in float32 over the last dimension."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x):
        shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
        scale = jnp.reshape(
            self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32), shape
        )
        if self.kind == "rms":
            return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps) * scale
        bias = jnp.reshape(
            self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32), shape
        )
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + self.eps) * scale
            + bias
        )


class Value(nn.Module):
    """A linear value head, zero at the start: advantages are then returns, not
    noise.
    """

    @nn.compact
    def __call__(self, hidden):
        kernel = self.param("kernel", nn.initializers.zeros, (hidden.shape[-1], 1), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (), jnp.float32)
        return (hidden @ kernel)[..., 0] + bias


def dropped(x: Any, rate: float, key: Array | None, number: int) -> Any:
    """Dropout of a share `rate` with the key's `number`-th noise; nothing without a key
    (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html).
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0.0)
