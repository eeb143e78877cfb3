"""The table from logical axes to mesh axes, for parameters and for activations."""

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # mesh axes over which the batch is split

# Logical axis -> mesh axes. "width" is that of parameters; the width of the residual
# stream is never split.
LOGICAL: dict[str | None, tuple[str, ...]] = {
    "rows": ROWS,
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "width": ("fsdp",),
    None: (),
}


def row_shards(groups: int = 0) -> int:
    """The number of devices over which the rows of so many groups are split; 1 without
    a mesh, and if they do not divide: then they stay whole.
    """
    shards = math.prod(_mesh_shape().get(axis, 1) for axis in ROWS)
    return 1 if groups % shards else shards


def gather_after(x: Any, weights: Any) -> tuple[Any, Any]:
    """(x, weights), of which the weights are gathered from their shards only once x is
    known: all layers' at once would fill the memory.
    """
    sharded = _mesh_shape().get("fsdp", 1) > 1
    return jax.lax.optimization_barrier((x, weights)) if sharded else (x, weights)


def _mesh_shape() -> dict[str, int]:
    """The sizes of our axes on the abstract mesh around the program; {} without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if set(AXES) <= set(mesh.axis_names) else {}


def constrain(x: Any, *names: str | None) -> Any:
    """`x` sharded over the logical axes `names`, on the abstract mesh around the
    program; unchanged without a mesh. A dimension that is not divisible stays whole.
    """
    sizes = _mesh_shape()
    if not sizes:
        return x
    parts = [LOGICAL[name] for name in names]
    fits = [
        size % math.prod(sizes[axis] for axis in part) == 0
        for part, size in zip(parts, x.shape, strict=True)
    ]
    spec = PartitionSpec(*(part if part and fit else None for part, fit in zip(parts, fits)))
    return jax.lax.with_sharding_constraint(x, spec)
