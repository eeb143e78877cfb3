"""Where arrays lie on a mesh of devices: one small table from names of parameters to logical axes (from those to mesh axes:
`models/layout.py`).

A mesh has up to three axes: `data` (rows alone), `fsdp` (rows, and parameters cut up and gathered when needed) and `tensor`
(the products themselves). What a rule cannot cut, because a size does not divide, is cut along another dimension if it is large.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxppo.config import UserError
from jaxppo.models.layout import AXES, LOGICAL, ROWS
from jaxppo.types import PyTree

LARGE = 2**20  # bytes above which nothing stays whole when it can be cut

# The end of a parameter's path -> the logical axis of each of its dimensions. Kernels are [in, out].
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
    """Sizes of the mesh's axes from `data=2,fsdp=2,tensor=2`; axes that are not named have size 1.

    >>> parse_mesh("fsdp=4")
    {'data': 1, 'fsdp': 4, 'tensor': 1}
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdigit() or int(size) < 1:
            raise UserError(f"--mesh {text!r}: {part!r} is not AXIS=SIZE with one of {', '.join(AXES)} and a size above 0")
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str, devices: list | None = None) -> Mesh:
    """The mesh of `parse_mesh` over these devices (default: all). Raises UserError when the sizes do not multiply to them."""
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text)
    if math.prod(sizes.values()) != len(devices):
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"--mesh {text!r} is {product} = {math.prod(sizes.values())} devices, but there are {len(devices)}")
    # Auto axes: the default, Explicit, would want a sharding on every operation.
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_of(path: tuple[str, ...], shape: tuple[int, ...], itemsize: int, mesh: Mesh) -> PartitionSpec:
    """How one array of the state is cut. The optimizer's moments end in their parameter's name, and lie as it does."""
    logical = RULES.get(path[-2:], (None,) * len(shape))
    if "layers" in path and len(logical) == len(shape) - 1:
        logical = (None, *logical)  # scanned: all layers in one array, the first dimension
    known = len(logical) == len(shape)
    axes: list[str | None] = [next(iter(LOGICAL[name]), None) for name in logical] if known else [None] * len(shape)
    axes = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True)]
    for axis in ("fsdp", "tensor"):  # what is left whole and large is cut along its longest dimension that divides
        if math.prod(shape) * itemsize <= LARGE or mesh.shape[axis] == 1 or axis in axes:
            continue
        free = [i for i, size in enumerate(shape) if axes[i] is None and size % mesh.shape[axis] == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = axis
    return PartitionSpec(*axes)


def of_state(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every array of a tree of parameters, or of a whole state."""

    def one(path, x):
        names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        itemsize = 0 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        return NamedSharding(mesh, spec_of(names, x.shape, itemsize, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def of_rows(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The batch's rows over `data` and `fsdp`, after `leading` dimensions that are not cut."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, ROWS))
