"""Shard arrays over a mesh of devices: a table from parameter names to logical axes.

`models/layout.py` maps logical axes to mesh axes. A mesh has up to three: `data`
(rows), `fsdp` (rows, and parameters that are gathered when needed) and `tensor` (the
matrix products). A large array that a rule cannot shard, because a size does not
divide, is sharded along another dimension.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxppo.errors import UserError
from jaxppo.models.layout import AXES, LOGICAL, ROWS, row_shards
from jaxppo.types import PyTree

LARGE = 2**20  # bytes above which every array is sharded if it can be

# The end of a parameter's path -> the logical axis of each of its dimensions. Kernels
# are [in, out]; adapters, [in, rank] and [rank, out], are sharded as their kernel is.
RULES: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embed", "embedding"): ("vocab", "width"),
    ("positions", "embedding"): (None, "width"),
    ("head", "kernel"): ("width", "vocab"),
    ("q", "kernel"): ("width", "heads"),
    ("k", "kernel"): ("width", "heads"),
    ("v", "kernel"): ("width", "heads"),
    ("o", "kernel"): ("heads", "width"),
    ("up", "kernel"): ("width", "mlp"),
    ("gate", "kernel"): ("width", "mlp"),
    ("down", "kernel"): ("mlp", "width"),
}
RULES |= {
    (layer, name): (axes[0], None) if name == "lora_a" else (None, axes[1])
    for (layer, leaf), axes in RULES.items()
    if leaf == "kernel"
    for name in ("lora_a", "lora_b")
}


def parse_mesh(text: str) -> dict[str, int]:
    """Parse sizes of axes such as `data=2,fsdp=2,tensor=2`; the default is 1.

    >>> parse_mesh("fsdp=4")
    {'data': 1, 'fsdp': 4, 'tensor': 1}
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdigit() or int(size) < 1:
            raise UserError(
                f"--mesh {text!r}: {part!r} is not AXIS=SIZE with one of {', '.join(AXES)} and a "
                "size above 0"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str, devices: list | None = None) -> Mesh:
    """Make the mesh of `parse_mesh` over the devices (default: all). Raises UserError
    if the sizes do not multiply to their number.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text)
    if math.prod(sizes.values()) != len(devices):
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"--mesh {text!r} is {product} = {math.prod(sizes.values())} devices, but there are "
            f"{len(devices)}"
        )
    # Auto axes: the default, Explicit, needs a sharding on every operation.
    return Mesh(
        np.asarray(devices).reshape(tuple(sizes.values())),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def spec_of(
    path: tuple[str, ...], shape: tuple[int, ...], itemsize: int, mesh: Mesh
) -> PartitionSpec:
    """The partition of one array of the state. Paths of an optimizer's moments end in
    their parameter's name, so they are sharded alike.
    """
    logical = RULES.get(path[-2:], (None,) * len(shape))
    if "layers" in path and len(logical) == len(shape) - 1:
        # scanned: all layers in one array, the first dimension
        logical = (None, *logical)
    known = len(logical) == len(shape)
    axes: list[str | None] = (
        [next(iter(LOGICAL[name]), None) for name in logical] if known else [None] * len(shape)
    )
    fits = lambda axis, size: (
        axis is not None and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
    )
    axes = [axis if fits(axis, size) else None for axis, size in zip(axes, shape, strict=True)]
    # shard what is still whole and large along its longest dimension that divides
    for axis in ("fsdp", "tensor"):
        if math.prod(shape) * itemsize <= LARGE or mesh.shape[axis] == 1 or axis in axes:
            continue
        free = [
            i for i, size in enumerate(shape) if axes[i] is None and size % mesh.shape[axis] == 0
        ]
        if free:
            axes[max(free, key=lambda i: shape[i])] = axis
    return PartitionSpec(*axes)


def state_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every array of a state, or of a tree of parameters."""

    def one(path, x):
        names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        itemsize = 0 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        return NamedSharding(mesh, spec_of(names, x.shape, itemsize, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shard a state or parameters by `state_shardings`, array by array, so that no
    device ever holds more than its share.

    Arrays that are already there are not copied. NumPy arrays and those of one device
    must be the same in every process.
    """
    return jax.tree.map(put, tree, state_shardings(tree, mesh))


def put(x: Any, where: NamedSharding) -> jax.Array:
    """Put one array where a sharding says."""
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(where, x.ndim):
        return x
    if isinstance(x, jax.Array) and jax.process_count() == 1:
        # An unsharded array would share its memory with `x`, whatever `may_alias` says,
        # and be donated with it.
        return jax.device_put(
            jnp.copy(x) if where.shard_shape(x.shape) == x.shape else x, where, may_alias=False
        )
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=where)(x)
    return from_local_shards(x, where)


def from_local_shards(x: Any, where: NamedSharding) -> jax.Array:
    """Make a global array from the shards of each process, which all have the same
    `x`.
    """
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = from_local_shards(jax.random.key_data(x), NamedSharding(where.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    # Copies: on a CPU, two arrays could share the NumPy array's memory, and one of them
    # may be donated.
    return jax.make_array_from_callback(host.shape, where, lambda index: np.array(host[index]))


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh of the arrays of a tree; None if each is on one device."""
    meshes = (
        getattr(x.sharding, "mesh", None) for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)
    )
    return next(
        (mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.axis_names == AXES), None
    )


@contextlib.contextmanager
def rows_on_mesh(params: PyTree, rows: PyTree) -> Iterator[PyTree]:
    """Shard rows over the mesh of `params`, if there is one, for a program outside of
    the step, which is called in this context. Rows that do not divide stay whole.
    """
    mesh = mesh_of(params)
    if mesh is None:
        yield rows
        return
    split, whole = row_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    cut = lambda x: put(x, split if x.ndim and x.shape[0] % row_shards() == 0 else whole)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield jax.tree.map(cut, rows)


def row_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The sharding of a batch: rows over `data` and `fsdp`, after `leading`
    dimensions.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, ROWS))
