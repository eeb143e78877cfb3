"""Attention without parameters: who sees whom, rotary positions, and the weighted
sum.
"""

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
    """softmax(q kᵀ / √D) v in float32, each group of H / K query heads sharing one
    key/value head; fused where it can be.
    """
    if fits_kernel(q.shape, k.shape[2], q.dtype, jax.default_backend()) and new_enough(
        jax.devices()[0]
    ):
        return fused(q, k, v, visible, implementation="cudnn")
    rows, heads, queries, size = q.shape
    groups = k.shape[1]
    out_dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    # The queries of a group's heads stand under each other; four dimensions all the way
    # are a third faster than five on a CPU.
    q = q.reshape(rows, groups, heads // groups * queries, size)
    visible = jnp.tile(visible, (1, heads // groups, 1))[:, None]
    scores = jnp.einsum("bgqd,bgsd->bgqs", q, k, preferred_element_type=out_dtype) * size**-0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, NEGATIVE)).astype(v.dtype)
    out = jnp.einsum("bgqs,bgsd->bgqd", weights, v, preferred_element_type=out_dtype)
    return out.reshape(rows, heads, queries, size)


def fits_kernel(shape: tuple[int, ...], keys: int, dtype, backend: str) -> bool:
    """Whether cuDNN's flash attention takes queries [B H Q D] and so many keys: 16
    bits, D a multiple of 8 up to 128, and, since the mask is a bias to it, even
    lengths. (One query a row, in decoding, gains nothing: it is bound by the cache's
    memory.)
    """
    _, _, queries, size = shape
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return (
        backend == "gpu"
        and half
        and size % 8 == 0
        and size <= 128
        and queries % 2 == 0
        and keys % 2 == 0
    )


def new_enough(device) -> bool:
    """Whether a GPU has that kernel: NVIDIA's from Ampere on (compute capability 8.0).

    https://docs.nvidia.com/deeplearning/cudnn/latest/operations/Attention.html
    """
    known = re.fullmatch(
        r"\d+\.\d+", str(getattr(device, "compute_capability", ""))
    )  # AMD's is a name
    return known is not None and float(known[0]) >= 8


def fused(q, k, v, visible, *, implementation: str) -> Float[Array, "B H Q D"]:
    """`attend` by `jax.nn.dot_product_attention`, which has time before heads and
    returns the inputs' type.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"implementation": implementation}
    out = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], **options)
    return out.swapaxes(1, 2).astype(jnp.float32)


def remember(
    past, k: Float[Array, "B K Q D"], v: Float[Array, "B K Q D"], slot
) -> tuple[tuple, Array, Array]:
    """(the past with new keys and values from `slot` on, all keys and all values of
    this layer [B K S D]).

    `past` is the layer's own (keys, values); or, of scanned layers, those of all layers
    [N B K S D] and the layer's number: written in place, as a loop's carry, they are
    never copied.
    """
    keys, values, *layer = past
    if not layer:
        put = lambda old, new: jax.lax.dynamic_update_slice(
            old, new.astype(old.dtype), (0, 0, slot, 0)
        )
        keys, values = put(keys, k), put(values, v)
        return (keys, values), keys, values
    put = lambda old, new: jax.lax.dynamic_update_slice(
        old, new.astype(old.dtype)[None], (layer[0], 0, 0, slot, 0)
    )
    keys, values = put(keys, k), put(values, v)
    take = lambda x: jax.lax.dynamic_index_in_dim(x, layer[0], keepdims=False)
    return (keys, values, layer[0]), take(keys), take(values)


def visibility(
    attend_all: Bool[Array, "B S"], slot: Int[Array, ""] | int, length: int, window: int | None
) -> Bool[Array, "B Q S"]:
    """Which slots each of the `length` new tokens, the first of them in slot `slot`,
    may look at.
    """
    query = slot + jnp.arange(length, dtype=jnp.int32)[:, None]
    key = jnp.arange(attend_all.shape[1], dtype=jnp.int32)[None]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    return allowed[None] & attend_all[:, None]


def rotations(
    position: Int[Array, "B L"], config: ModelConfig
) -> tuple[Float[Array, "B L 1 D"], Float[Array, "B L 1 D"]]:
    """cos and sin of rotary embeddings (Su et al. 2021,
    https://arxiv.org/abs/2104.09864), halves layout.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        frequency = _llama3_scaling(frequency, *config.rope_scaling)
    angle = position[..., None].astype(jnp.float32) * frequency[None, None]
    angle = jnp.concatenate([angle, angle], -1)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def _llama3_scaling(frequency, factor, low, high, original_length):
    """Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept,
    those between blended.
    """
    # turns over the original context
    turns = original_length * frequency / (2 * jnp.pi)
    blend = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (blend + (1 - blend) / factor)


def rotate(x: Float[Array, "B L H D"], rotation: tuple[Array, Array]) -> Float[Array, "B L H D"]:
    """x rotated by its position."""
    cos, sin = rotation
    first, second = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-second, first], -1) * sin
