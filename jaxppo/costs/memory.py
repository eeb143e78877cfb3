"""How much memory a step needs at least, against what a device has, before minutes go
into compiling it; and what lowers it.

`plan.py` has the compiler's own account; this is the part of it that can be had from
the shapes at once.
"""

import math
import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxppo.config import Config, RunConfig
from jaxppo.errors import UserError
from jaxppo.parallel import sharding
from jaxppo.types import Model, PyTree, TrainState

GIB = 2**30


def check(
    config: RunConfig, model: Model, state: TrainState, *, shares: int, replicated: bool = False
) -> None:
    """Raise UserError, with the numbers and what to lower, when the step cannot fit.

    `state` is as it lies before the step places it (of a run over a mesh, on the mesh);
    the rest as in `least`.
    """
    need, have = least(config, model, state, shares=shares, replicated=replicated), available()
    if need > have:
        raise UserError(
            f"the step needs at least {need / GIB:.1f} GiB on each device, which has {have / GIB:.1f} GiB; "
            f"lower it with {'; '.join(cures(config))}"
        )


def least(
    config: Config, model: Model, state: TrainState, *, shares: int, replicated: bool = False
) -> int:
    """Bytes on one device that no schedule can do without: its part of the state, of
    one gradient, of the cache of keys and values and of the logits of one token.

    Args:
        shares: over how many devices the rows are split. replicated: under pmap: the
        first device keeps the state that was begun with beside its copy.
    """
    mesh = sharding.mesh_of(state.params)
    rows = config.rows // shares
    cache = jax.eval_shape(lambda: jax.tree.leaves(model.init_cache(rows, config.length)))
    vocabulary = jax.eval_shape(model.head, jax.eval_shape(model.init, jax.random.key(0))).shape[0]
    cut = 1 if mesh is None else mesh.shape["tensor"]  # heads and vocabulary
    return (
        (1 + replicated) * total(state)
        + total(state.params)
        + (total(cache) + 4 * rows * vocabulary) // cut
    )


def total(tree: PyTree) -> int:
    """Bytes of all arrays, each counted once; of an array on a mesh, of the part that
    one device has.
    """
    leaves = {id(x): x for x in jax.tree.leaves(tree)}.values()
    itemsize = lambda x: 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
    part = lambda x: x.sharding.shard_shape(x.shape) if isinstance(x, jax.Array) else x.shape
    return sum(math.prod(part(x)) * itemsize(x) for x in leaves)


def available() -> int:
    """Bytes that one device may use: its own memory, or on a CPU what the machine, its
    container and `ulimit -v` leave.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits += [soft] if soft != resource.RLIM_INFINITY else []
    group = Path("/sys/fs/cgroup/memory.max")
    text = group.read_text().strip() if group.exists() else "max"
    limits += [int(text)] if text.isdigit() else []
    return min(limits)


def cures(config: RunConfig, *, devices: int | None = None, most: int = 3) -> list[str]:
    """Settings that lower the memory of this configuration, the cheapest first."""
    devices = jax.device_count() if devices is None else devices
    rows = config.batch_size // config.minibatches
    out = []
    if config.remat == "none":
        out.append("--remat block (activations are computed twice)")
    if rows // config.group_size > config.microbatches:
        out.append(
            f"--microbatches {config.microbatches * 2} (a minibatch's gradient in more parts)"
        )
    if not config.lora:
        out.append("--lora 8 (one copy of the weights, no moments for them)")
    if devices > 1 and "fsdp" not in config.mesh:
        out.append(f"--mesh fsdp={devices} (parameters and moments cut up)")
    if config.dtype == "float32":
        out.append("--dtype bfloat16 (activations and cache of half the size)")
    out.append(
        f"--batch-size {max(config.batch_size // 2, config.minibatches * config.group_size)}"
    )
    return out[:most]
