"""Attention without parameters: masks, rotary positions, cache, weighted sum."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxppo.models.shapes import ModelConfig

NEGATIVE = -1e30  # finite: a row that may attend to nothing must not become NaN


def attend(
    q: Float[Array, "B H Q D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    visible: Bool[Array, "B Q S"],
) -> Float[Array, "B H Q D"]:
    """softmax(q kᵀ / √D) v in float32; H / K query heads share one key/value head."""
    backend, device = jax.default_backend(), jax.devices()[0]
    if fits_cudnn(q.shape, k.shape[2], q.dtype, backend) and has_cudnn_attention(device):
        return fused_attention(q, k, v, visible, implementation="cudnn")
    rows, heads, queries, size = q.shape
    groups = k.shape[1]
    out_dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    # A group's query heads join along time: 4 dimensions are a third faster than 5.
    q = q.reshape(rows, groups, heads // groups * queries, size)
    visible = jnp.tile(visible, (1, heads // groups, 1))[:, None]
    scores = jnp.einsum("bgqd,bgsd->bgqs", q, k, preferred_element_type=out_dtype) * size**-0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, NEGATIVE)).astype(v.dtype)
    out = jnp.einsum("bgqs,bgsd->bgqd", weights, v, preferred_element_type=out_dtype)
    return out.reshape(rows, heads, queries, size)


def fits_cudnn(shape: tuple[int, ...], keys: int, dtype, backend: str) -> bool:
    """Whether cuDNN's flash attention takes queries [B H Q D] and `keys` keys."""
    _, _, queries, size = shape
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    even = queries % 2 == 0 and keys % 2 == 0  # the mask is passed as a bias
    return backend == "gpu" and half and even and size % 8 == 0 and size <= 128


def has_cudnn_attention(device) -> bool:
    """Whether the GPU is an NVIDIA Ampere or newer: compute capability 8.0
    (https://docs.nvidia.com/deeplearning/cudnn/latest/operations/Attention.html).
    """
    capability = str(getattr(device, "compute_capability", ""))  # AMD's is a name
    return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8


def fused_attention(q, k, v, visible, *, implementation: str) -> Float[Array, "B H Q D"]:
    """`attend` by `jax.nn.dot_product_attention`, which has time before heads."""
    options: dict[str, Any] = {"mask": visible[:, None], "implementation": implementation}
    out = jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), **options)
    return out.swapaxes(1, 2).astype(jnp.float32)


def update_cache(
    past, k: Float[Array, "B K Q D"], v: Float[Array, "B K Q D"], slot
) -> tuple[tuple, Array, Array]:
    """(the past with new keys and values at `slot`, all keys, all values [B K S D]). Of
    scanned layers `past` is (keys, values, layer number), with all layers in one array
    [N B K S D]: updated in place as a loop's carry, they are never copied.
    """
    keys, values, *layer = past

    def write(old, new):
        new = new.astype(old.dtype)
        start = (*layer, 0, 0, slot, 0)
        return jax.lax.dynamic_update_slice(old, new[None] if layer else new, start)

    keys, values = write(keys, k), write(values, v)
    if not layer:
        return (keys, values), keys, values
    take = lambda x: jax.lax.dynamic_index_in_dim(x, layer[0], keepdims=False)
    return (keys, values, layer[0]), take(keys), take(values)


def attention_mask(
    attend_all: Bool[Array, "B S"], slot: Int[Array, ""] | int, length: int, window: int | None
) -> Bool[Array, "B Q S"]:
    """Which slots each of `length` new tokens sees; the first is in slot `slot`."""
    query = slot + jnp.arange(length, dtype=jnp.int32)[:, None]
    key = jnp.arange(attend_all.shape[1], dtype=jnp.int32)[None]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    return allowed[None] & attend_all[:, None]


def rotary_embedding(
    position: Int[Array, "B L"], config: ModelConfig
) -> tuple[Float[Array, "B L 1 D"], Float[Array, "B L 1 D"]]:
    """cos and sin of rotary embeddings (https://arxiv.org/abs/2104.09864)."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        frequency = _llama3_scaling(frequency, *config.rope_scaling)
    angle = position[..., None].astype(jnp.float32) * frequency[None, None]
    angle = jnp.concatenate([angle, angle], -1)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def _llama3_scaling(frequency, factor, low, high, original_length):
    """Llama 3.1's rule: divide long wavelengths by `factor`, keep short ones."""
    turns = original_length * frequency / (2 * jnp.pi)  # over the original context
    blend = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (blend + (1 - blend) / factor)


def apply_rotary(
    x: Float[Array, "B L H D"], rotation: tuple[Array, Array]
) -> Float[Array, "B L H D"]:
    """x rotated by its position."""
    cos, sin = rotation
    first, second = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-second, first], -1) * sin
