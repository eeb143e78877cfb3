"""Attention without parameters: masks, rotary positions, weighted sums."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxppo.models.shapes import ModelConfig

NEGATIVE = -1e30  # finite: a row that may attend to nothing must not become NaN
LONG = 1024  # keys from which the backward pass computes the weights again
BLOCKS, LEAST_BLOCK = 4, 96  # of the queries of causal attention, and least queries of one


def attend(
    q: Float[Array, "B H Q D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    visible: Bool[Array, "B Q S"],
    cap: float | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "B H Q D"]:
    """softmax(q kᵀ / √D) v in float32; H / K query heads share one key/value head.

    Args:
      cap: scores s become cap · tanh(s / cap) (https://arxiv.org/abs/2408.00118).
      causal: no query sees a key behind its own slot (Q = S). A block of queries then
        meets the keys up to its end alone: five eighths of the work, with four blocks.
    """
    backend, device = jax.default_backend(), jax.devices()[0]
    if (
        cap is None
        and fits_cudnn(q.shape, k.shape[2], q.dtype, backend)
        and has_cudnn_attention(device)
    ):
        return fused_attention(q, k, v, visible, implementation="cudnn")
    rows, heads, queries, size = q.shape
    groups = k.shape[1]
    again = k.shape[2] >= LONG

    def block(begin: int, end: int, keys: int) -> Array:
        # A group's query heads join along time: 4 dimensions are a third faster than 5.
        own = q[:, :, begin:end].reshape(rows, groups, heads // groups * (end - begin), size)
        seen = jnp.tile(visible[:, begin:end, :keys], (1, heads // groups, 1))
        known = own, k[:, :, :keys], v[:, :, :keys], seen, again
        out: Any = weighted_sum(*known) if cap is None else _weighted_sum_fwd(*known, cap)[0]
        return out.reshape(rows, heads, end - begin, size)

    ends = block_ends(queries) if causal else (queries,)
    keys = ends if causal else (k.shape[2],)
    outs = [block(*each) for each in zip((0, *ends), ends, keys)]
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, 2)


def block_ends(queries: int) -> tuple[int, ...]:
    """Where the blocks of so many queries end: `BLOCKS` of them, or as many of
    `LEAST_BLOCK` queries as fit.

    >>> block_ends(1536), block_ends(200), block_ends(191)
    ((384, 768, 1152, 1536), (100, 200), (191,))
    """
    number = max(min(queries // LEAST_BLOCK, BLOCKS), 1)
    size = -(-queries // number)
    return (*range(size, queries, size), queries)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_sum(
    q: Float[Array, "B K Q D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    visible: Bool[Array, "B Q S"],
    again: bool = False,
) -> Float[Array, "B K Q D"]:
    """y = w v with w = softmax(q kᵀ / √D) over what is visible.

    ∂w = ∂y vᵀ,  ∂s = w (∂w − Σ w ∂w),  ∂v = wᵀ ∂y,  ∂q = ∂s k / √D,  ∂k = ∂sᵀ q / √D

    The backward pass keeps w alone, in the type of v, or computes it `again`. It rounds
    ∂y and ∂s like the operands, as FlashAttention does
    (https://arxiv.org/abs/2205.14135).
    """
    return _weighted_sum_fwd(q, k, v, visible, again)[0]


def _weights(q, k, v, visible, cap=None):
    return jax.nn.softmax(_scores(q, k, visible, cap)).astype(v.dtype)


def _weighted_sum_fwd(q, k, v, visible, again, cap=None):
    weights = _weights(q, k, v, visible, cap)
    kept = None if again else weights
    return _product("bgqs,bgsd->bgqd", weights, v), (q, k, v, kept, visible)


def _weighted_sum_bwd(again, residuals, dy):
    q, k, v, weights, visible = residuals
    if again:
        # without the barrier, the compiler would keep those of the forward pass
        q, k, dy = jax.lax.optimization_barrier((q, k, dy))
        weights = _weights(q, k, v, visible)
    scale = q.shape[-1] ** -0.5
    dy = dy.astype(v.dtype)
    dw = _product("bgqd,bgsd->bgqs", dy, v)
    w = weights.astype(dw.dtype)
    ds = w * (dw - (w * dw).sum(-1, keepdims=True)) * scale
    # A query that sees nothing has weights, but no gradient.
    ds = jnp.where(visible[:, None], ds, 0.0).astype(v.dtype)
    dq, dk = _product("bgqs,bgsd->bgqd", ds, k), _product("bgqs,bgqd->bgsd", ds, q)
    dv = _product("bgqs,bgqd->bgsd", weights, dy)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap · tanh(x / cap); x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _scores(q, k, visible, cap):
    """q kᵀ / √D, capped, where it is visible, else the lowest number."""
    scores = soft_cap(_product("bgqd,bgsd->bgqs", q, k) * q.shape[-1] ** -0.5, cap)
    return jnp.where(visible[:, None], scores, NEGATIVE)


def _product(subscripts: str, x: Array, y: Array) -> Array:
    """A product with float32 sums; float64 stays float64."""
    out = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(subscripts, x, y, preferred_element_type=out)


def attend_cached(
    q: Float[Array, "B H Q D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    visible: Bool[Array, "B Q S"],
    filled: Int[Array, ""],
    prompt: tuple[Float[Array, "V K P D"], Float[Array, "V K P D"]],
    prompt_visible: Bool[Array, "R C P"],
    cap: float | None = None,
) -> Float[Array, "B H Q D"]:
    """`attend` of new tokens in each row, over a prompt that G adjacent rows share and
    the row's own slots, with one softmax. The group's queries meet the prompt together,
    and only as many own slots are read as are filled, up to the next of `read_sizes`.

    prompt_visible: [V 1 P] if a group's tokens all see the same of their prompt, else
        [B Q P].
    """
    rows, heads, queries, size = q.shape
    groups, kv_heads, slots = prompt[0].shape[:3]
    # samples of a prompt, queries of a key head
    shape = (rows // groups, heads // kv_heads * queries)
    tile = lambda visible: jnp.tile(visible, (1, heads // kv_heads, 1))

    def together(x):  # [B K h ...] -> [V K G*h ...]
        x = x.reshape(groups, shape[0], kv_heads, shape[1], x.shape[-1]).swapaxes(1, 2)
        return x.reshape(groups, kv_heads, -1, x.shape[-1])

    def apart(x):
        x = x.reshape(groups, kv_heads, *shape, x.shape[-1]).swapaxes(1, 2)
        return x.reshape(rows, kv_heads, shape[1], x.shape[-1])

    q, visible = q.reshape(rows, kv_heads, shape[1], size), tile(visible)
    if prompt_visible.shape[:2] != (groups, 1):
        prompt_visible = tile(prompt_visible).reshape(groups, -1, slots)
    before = apart(_scores(together(q), prompt[0], prompt_visible, cap))

    def read(length, q, k, v, visible, before):
        k, v, visible = k[:, :, :length], v[:, :, :length], visible[:, :, :length]
        scores = jnp.concatenate([before, _scores(q, k, visible, cap)], -1)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        return weights[..., :slots], _product("bgqs,bgsd->bgqd", weights[..., slots:], v)

    sizes = read_sizes(k.shape[2])
    branches = [partial(read, length) for length in sizes]
    level = jnp.searchsorted(jnp.asarray(sizes), filled)
    weights, own = jax.lax.switch(level, branches, q, k, v, visible, before)
    shared = apart(_product("bgqs,bgsd->bgqd", together(weights), prompt[1]))
    return (own + shared).reshape(rows, heads, queries, size)


def read_sizes(slots: int) -> tuple[int, ...]:
    """The numbers of slots of which a cache of `slots` reads the least that suffices.

    >>> read_sizes(1024), read_sizes(24)
    ((128, 256, 512, 1024), (24,))
    """
    return (*(-(-slots // part) for part in (8, 4, 2) if slots >= 32 * part), slots)


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


def attention_mask(
    attend_all: Bool[Array, "B S"],
    slot: Int[Array, ""] | int,
    length: int,
    window: int | None,
    position: Int[Array, "R Q"] | None = None,
) -> Bool[Array, "_ Q S"]:
    """Which slots each of `length` new tokens sees; the first is in slot `slot`. A
    window counts tokens: between the turns of an episode, slots are empty.

    Args:
      position: of the new tokens, if they have no slots here. Each row of attend_all
        may belong to several rows of it.
    """
    query = slot + jnp.arange(length, dtype=jnp.int32)[:, None]
    key = jnp.arange(attend_all.shape[1], dtype=jnp.int32)[None]
    allowed = (key <= query)[None] & attend_all[:, None]
    if window is None:
        return allowed
    own = jnp.cumsum(attend_all, 1, dtype=jnp.int32) - 1
    if position is None:
        position = jax.lax.dynamic_slice(own, (0, slot), (len(own), length))
    each = lambda x: jnp.repeat(x, len(position) // len(x), 0)
    return each(allowed) & (each(own)[:, None] > position[:, :, None] - window)


def packed_mask(
    attend: Bool[Array, "B L"],
    segments: Int[Array, "B L 2"],
    position: Int[Array, "B L"],
    window: int | None,
) -> Bool[Array, "B L L"]:
    """Which slots each token of a packed row sees: those of its own prompt and of its
    own response, up to itself.

    segments: the number of the prompt, and that of the response; 0 for a prompt's own
        tokens.
    """
    slot = jnp.arange(attend.shape[1], dtype=jnp.int32)
    prompt, response = segments[..., 0], segments[..., 1]
    same = prompt[:, :, None] == prompt[:, None]
    own = (response[:, None] == 0) | (response[:, :, None] == response[:, None])
    allowed = same & own & attend[:, None] & (slot[:, None] >= slot[None])[None]
    if window is not None:
        allowed &= position[:, None] > position[:, :, None] - window
    return allowed


def rotary_embedding(
    position: Int[Array, "B L"], config: ModelConfig, window: int | None = None
) -> tuple[Float[Array, "B L 1 D"], Float[Array, "B L 1 D"]]:
    """cos and sin of rotary embeddings (https://arxiv.org/abs/2104.09864), in layers
    with this window.
    """
    half = config.head_dim // 2
    theta, scaling = config.rope_theta, config.rope_scaling
    if window is not None and config.window_theta is not None:
        theta, scaling = config.window_theta, None
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        scale = _llama3_scaling if len(scaling) > 1 else jnp.divide
        frequency = scale(frequency, *scaling)
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
