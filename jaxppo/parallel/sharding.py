"""Where arrays lie on a mesh of devices: one small table from names of parameters to
logical axes (from those to mesh axes: `models/layout.py`).

A mesh has up to three axes: `data` (rows alone), `fsdp` (rows, and parameters cut up
and gathered when needed) and `tensor` (the products themselves). What a rule cannot
cut, because a size does not divide, is cut along another dimension if it is large.
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

LARGE = 2**20  # bytes above which nothing stays whole when it can be cut

# The end of a parameter's path -> the logical axis of each of its dimensions. Kernels
# are [in, out].
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


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of the mesh's axes from `data=2,fsdp=2,tensor=2`; axes that are not named
    have size 1.

    >>> parse_mesh("fsdp=4")
    {'data': 1, 'fsdp': 4, 'tensor': 1}
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdigit() or int(size) < 1:
            raise UserError(
                f"--mesh {text!r}: {part!r} is not AXIS=SIZE with one of {', '.join(AXES)} and a size above 0"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str, devices: list | None = None) -> Mesh:
    """The mesh of `parse_mesh` over these devices (default: all). Raises UserError when
    the sizes do not multiply to them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text)
    if math.prod(sizes.values()) != len(devices):
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"--mesh {text!r} is {product} = {math.prod(sizes.values())} devices, but there are {len(devices)}"
        )
    # Auto axes: the default, Explicit, would want a sharding on every operation.
    return Mesh(
        np.asarray(devices).reshape(tuple(sizes.values())),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def spec_of(
    path: tuple[str, ...], shape: tuple[int, ...], itemsize: int, mesh: Mesh
) -> PartitionSpec:
    """How one array of the state is cut. The optimizer's moments end in their
    parameter's name, and lie as it does.
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
    for axis in (
        "fsdp",
        "tensor",
    ):  # what is left whole and large is cut along its longest dimension that divides
        if math.prod(shape) * itemsize <= LARGE or mesh.shape[axis] == 1 or axis in axes:
            continue
        free = [
            i for i, size in enumerate(shape) if axes[i] is None and size % mesh.shape[axis] == 0
        ]
        if free:
            axes[max(free, key=lambda i: shape[i])] = axis
    return PartitionSpec(*axes)


def state_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every array of a tree of parameters, or of a whole state."""

    def one(path, x):
        names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        itemsize = 0 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        return NamedSharding(mesh, spec_of(names, x.shape, itemsize, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """A tree of parameters, or a whole state, where `of_state` has it, array by array:
    no device ever holds more than its own. What lies there already is not copied. NumPy
    arrays, or those of one device, of which every process has the same.
    """
    return jax.tree.map(put, tree, state_shardings(tree, mesh))


def put(x: Any, where: NamedSharding) -> jax.Array:
    """One array of `place`."""
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(where, x.ndim):
        return x
    if isinstance(x, jax.Array) and jax.process_count() == 1:
        # What stays whole would be, on its own device, the same memory, whatever
        # `may_alias` says; and given away with the other.
        return jax.device_put(
            jnp.copy(x) if where.shard_shape(x.shape) == x.shape else x, where, may_alias=False
        )
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=where)(x)
    return from_local_shards(x, where)


def from_local_shards(x: Any, where: NamedSharding) -> jax.Array:
    """A global array to which this process gives the shards of its own devices; all
    processes have the same `x`.
    """
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = from_local_shards(jax.random.key_data(x), NamedSharding(where.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    # Copies: on a CPU an array may be the NumPy one's own memory, and two of them, of
    # which one is given to a step, the same.
    return jax.make_array_from_callback(host.shape, where, lambda index: np.array(host[index]))


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh over which arrays of a tree lie; None where they lie on one device
    each.
    """
    meshes = (
        getattr(x.sharding, "mesh", None) for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)
    )
    return next(
        (mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.axis_names == AXES), None
    )


@contextlib.contextmanager
def rows_on_mesh(params: PyTree, rows: PyTree) -> Iterator[PyTree]:
    """Rows for a program outside of the step, with parameters that lie where they do:
    on a mesh the rows are cut over it (whole where they do not divide), and the model
    is told of it. The program is called inside.
    """
    mesh = mesh_of(params)
    if mesh is None:
        yield rows
        return
    cut = lambda x: put(
        x,
        row_sharding(mesh)
        if x.ndim and x.shape[0] % row_shards() == 0
        else NamedSharding(mesh, PartitionSpec()),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield jax.tree.map(cut, rows)


def row_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The batch's rows over `data` and `fsdp`, after `leading` dimensions that are not
    cut.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, ROWS))
