"""A lower bound of a step's memory from the shapes alone, before anything is compiled,
and settings that need less. `compiled.py` has the compiler's own numbers.
"""

import math
import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxppo import packing
from jaxppo.config import Config, RunConfig
from jaxppo.costs.chips import GIB
from jaxppo.errors import UserError
from jaxppo.parallel import sharding
from jaxppo.types import Model, PyTree, TrainState


def check_fits(
    config: RunConfig, model: Model, state: TrainState, *, shares: int, replicated: bool = False
) -> None:
    """Raise UserError if the step cannot fit. The arguments are those of
    `minimum_bytes`.
    """
    need, have = (
        minimum_bytes(config, model, state, shares=shares, replicated=replicated),
        device_memory(),
    )
    if need > have:
        raise UserError(
            f"the step needs at least {need / GIB:.1f} GiB on each device, which has "
            f"{have / GIB:.1f} GiB; lower it with {'; '.join(suggestions(config))}"
        )


def minimum_bytes(
    config: Config, model: Model, state: TrainState, *, shares: int, replicated: bool = False
) -> int:
    """The bytes that one device needs at least: its share of the state, one gradient,
    the KV cache and the logits of one token.

    Args:
      state: before the step places it; over a mesh, on the mesh.
      shares: the number of devices that share the rows.
      replicated: under pmap, where the first device also keeps the first state.
    """
    mesh = sharding.mesh_of(state.params)
    rows = config.rows // shares
    if packing.is_packed(model, config):
        prompts = rows // config.group_size, config.prompt_length
        parts = [prompts, (rows, config.response_length)]
    else:
        parts = [(rows, config.length)]
    cache = jax.eval_shape(lambda: [jax.tree.leaves(model.init_cache(*part)) for part in parts])
    vocabulary = jax.eval_shape(model.head, jax.eval_shape(model.init, jax.random.key(0))).shape[0]
    cut = 1 if mesh is None else mesh.shape["tensor"]  # heads and vocabulary
    return (
        (1 + replicated) * tree_bytes(state)
        + tree_bytes(state.params)
        + (tree_bytes(cache) + 4 * rows * vocabulary) // cut
    )


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays on one device; each array counts once."""
    leaves = {id(x): x for x in jax.tree.leaves(tree)}.values()
    itemsize = lambda x: 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
    part = lambda x: x.sharding.shard_shape(x.shape) if isinstance(x, jax.Array) else x.shape
    return sum(math.prod(part(x)) * itemsize(x) for x in leaves)


def device_memory() -> int:
    """Bytes that one device may use. On a CPU: the least of the machine's memory, its
    container's limit and `ulimit -v`.
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


def suggestions(config: RunConfig, *, devices: int | None = None, most: int = 3) -> list[str]:
    """Options that lower the memory, the cheapest first."""
    devices = jax.device_count() if devices is None else devices
    rows = config.batch_size // config.minibatches
    out = []
    if config.remat == "none":
        out.append("--remat block (activations are computed twice)")
    own = rows // devices if rows % devices == 0 else rows
    part = packing.part_rows(config, own, config.length)
    if config.layout == "packed" and part > 1:
        tokens = part // 2 * config.length
        out.append(f"--tokens-per-microbatch {tokens} (a minibatch's gradient in more parts)")
    if config.layout == "dense" and own > config.microbatches:
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
