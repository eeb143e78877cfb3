"""The keys and values that a transformer keeps of the tokens before."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxppo.models.layout import constrain
from jaxppo.types import PyTree


class Cache(struct.PyTreeNode):
    """Keys and values of each layer; every row fills the same slots."""

    keys: tuple[Float[Array, "B K S D"], ...]
    values: tuple[Float[Array, "B K S D"], ...]
    attend: Bool[Array, "B S"]
    filled: Int[Array, ""]  # slots in use
    # the filled cache of B / G prompts, each of G adjacent rows; None: the rows hold
    # their prompts themselves
    prompt: Any = None


def empty(
    layers: int, shape: tuple[int, int, int, int], dtype: Any, prompt: Cache | None = None
) -> Cache:
    """A cache with nothing in it, of keys and values [B K S D] a layer."""
    zeros = lambda: constrain(jnp.zeros(shape, dtype), "rows", "heads", None, None)
    keys, values = (tuple(zeros() for _ in range(layers)) for _ in range(2))
    attend = jnp.zeros((shape[0], shape[2]), bool)
    return Cache(keys, values, attend, jnp.zeros((), jnp.int32), prompt)


def write(
    old: Float[Array, "B K S D"], new: Float[Array, "B K Q D"], slot: Int[Array, ""] | int
) -> Float[Array, "B K S D"]:
    """The keys or values with new ones from `slot` on."""
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, slot, 0))


def take(caches: PyTree, take_rows: Any, take_prompts: Any) -> PyTree:
    """The caches of some rows, and of the prompts that they share. The functions pick
    along the first dimension of an array.
    """

    def one(cache: Cache) -> Cache:
        prompt = cache.prompt
        if prompt is not None:
            prompt = jax.tree.map(lambda x: take_prompts(x) if x.ndim else x, prompt)
        own = jax.tree.map(lambda x: take_rows(x) if x.ndim else x, cache.replace(prompt=None))
        return own.replace(prompt=prompt)

    return jax.tree.map(one, caches, is_leaf=lambda x: isinstance(x, Cache))
