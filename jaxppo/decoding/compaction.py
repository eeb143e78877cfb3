"""Decode fewer rows once enough have ended.

The rows of a decode loop stand in blocks [V W]: W rows that share a prompt. When the
rows that are still going fit into half of the rows, they move there, and a smaller loop
goes on. Rows never leave their shard of the batch ([S V W] below): nothing moves
between devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxppo.packing import join, split

LEAST_ROWS = 8  # fewer rows hardly cost less: each token reads all weights
LEAST_LENGTH = 64  # of a response; below, another loop costs more than it saves


class Size(NamedTuple):
    """Rows of a decode loop on a shard."""

    blocks: int
    width: int  # rows of a block


def sizes(groups: int, group_size: int, length: int) -> list[Size]:
    """The sizes of the loops: half the rows each time, first of each group, then of the
    groups.

    >>> [tuple(size) for size in sizes(4, 8, 1024)]
    [(4, 8), (4, 4), (4, 2)]
    """
    found = [Size(groups, group_size)]
    while length >= LEAST_LENGTH:
        blocks, width = found[-1]
        if blocks * width < 2 * LEAST_ROWS or (width % 2 and blocks % 2):
            break
        found.append(Size(blocks // 2, width) if width % 2 else Size(blocks, width // 2))
    return found


def fits(live: Bool[Array, "S V W"], size: Size) -> Bool[Array, ""]:
    """Whether the live rows fit into blocks of this size, on every shard.

    >>> fits(jnp.array([[[True, False], [True, False]]]), Size(2, 1))
    Array(True, dtype=bool)
    """
    blocks = -(-live.sum(-1) // size.width)
    return (blocks.sum(-1) <= size.blocks).all()


def choose(live: Bool[Array, "S V W"], size: Size) -> tuple[Int[Array, "S R"], Int[Array, "S U"]]:
    """(the rows that go on, the blocks whose prompts they read), numbers within the
    shard: all live rows if they fit.

    >>> rows, blocks = choose(
    ...     jnp.array([[[True, False], [False, False], [True, True]]]), Size(3, 1)
    ... )
    >>> rows.tolist(), blocks.tolist()
    ([[0, 4, 5]], [[0, 2, 2]])
    """
    shards, blocks, width = live.shape
    order = jnp.argsort(~live, -1, stable=True)  # the live rows of a block first
    rows = (order + width * jnp.arange(blocks)[None, :, None]).reshape(shards, -1, size.width)
    used = jnp.take_along_axis(live, order, -1).reshape(rows.shape).any(-1)
    chosen = jnp.argsort(~used, -1, stable=True)[:, : size.blocks]
    rows = jnp.take_along_axis(rows, chosen[:, :, None], 1).reshape(shards, -1)
    return rows, chosen // (width // size.width)


def take(x: Array, rows: Int[Array, "S R"]) -> Array:
    """These rows of x [B ...], each from its shard."""
    local = split(x, rows.shape[0])
    return join(jax.vmap(lambda own, index: own[index])(local, rows))


def put(x: Array, rows: Int[Array, "S R"], new: Array) -> Array:
    """x [B ...] with new rows: the inverse of `take`."""
    shards = rows.shape[0]
    write = lambda own, index, new: own.at[index].set(new)
    return join(jax.vmap(write)(split(x, shards), rows, split(new, shards)))
