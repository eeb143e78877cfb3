"""Compile a step ahead of time and read what it needs."""

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxppo import algorithms, models, parallel, policy, ppo
from jaxppo.config import RunConfig, validate
from jaxppo.costs import chips, phases, program
from jaxppo.costs.program import Collective
from jaxppo.models import lora
from jaxppo.models.shapes import ModelConfig
from jaxppo.parallel import sharding
from jaxppo.rewards import in_program
from jaxppo.types import Prompts, PyTree, TrainState


@dataclass(frozen=True)
class Report:
    """What a compiled step needs, on each device; bytes."""

    devices: int
    mesh: str
    seconds: float  # to compile
    arguments: int
    outputs: int
    aliased: int  # outputs written over arguments
    temporaries: int
    code: int  # the program itself
    collectives: dict[Collective, int]  # and how many such stand in the program
    phases: dict[str, tuple[float, float]]  # (operations, bytes), on each device
    matrices: frozenset[tuple[int, ...]] = frozenset()  # dimensions of the parameters
    involuntary: tuple[
        str, ...
        # operations at which the compiler gathers a whole tensor to cut it another way
    ] = ()
    inside: tuple[str, ...] = ()  # the phases that are parts of this one program
    # what the compiler said, if it gave up for want of memory; then `temporaries` is
    # all beside the arguments
    refused: str = ""

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def abstract_state(config: RunConfig, shape: ModelConfig) -> tuple[Any, TrainState]:
    """(model, the state's shapes): no array is made."""
    model, _ = models.make_model(config, shape)
    params = jax.eval_shape(model.init, jax.random.key(0))
    if config.lora:
        trained, base = lora.split(params, lora.is_adapter)
        frozen = {
            "base": jax.eval_shape(lambda p: policy.cast(p, model.dtype), base),
            "reference": None,
            "reward": {},
        }
    else:
        trained = params
        frozen = {
            "base": {},
            "reference": {name: x for name, x in params.items() if name != "critic"},
            "reward": {},
        }
    make = lambda trained, frozen, key: ppo.init_state(config, trained, frozen, key)
    return model, jax.eval_shape(make, trained, frozen, jax.random.key(0))


def compile_plan(config: RunConfig, shape: ModelConfig, devices: list) -> Report:
    """The whole step, compiled for these devices and taken apart. The reward counts a
    token: a reward model comes on top.
    """
    mesh_text = config.mesh or f"data={len(devices)}"
    mesh = sharding.make_mesh(mesh_text, devices)
    validate(config, devices=mesh.shape["data"] * mesh.shape["fsdp"])
    model, state = abstract_state(config, shape)
    parts = algorithms.make_parts(config, in_program.count_token(1))
    step = parallel.MeshStep(ppo.make_train_step(model, parts, config), mesh)
    integer: Any = jax.ShapeDtypeStruct((config.rows, config.prompt_length), jnp.int32)
    mask: Any = jax.ShapeDtypeStruct(integer.shape, bool)
    index: Any = jax.ShapeDtypeStruct((config.rows,), jnp.int32)
    extra: dict[str, Any] = {"task": index} if config.num_tasks > 1 else {}
    if shape.context_width:
        extra["context"] = jax.ShapeDtypeStruct(
            (config.rows, shape.context_length, shape.context_width), jnp.float32
        )
        extra["context_length"] = index
    started = time.monotonic()
    known: dict[str, Any] = {
        "phases": phases.phases(config, shape, mesh),
        "matrices": matrices((state.params, state.frozen["base"]), mesh),
    }
    with chips.quiet() as said:
        lowered = step.lower(step.abstract(state), Prompts(integer, mask, index, extra))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            held = bytes_held(state, mesh)
            return Report(
                len(devices),
                mesh_text,
                time.monotonic() - started,
                held,
                0,
                0,
                max(needed(str(error)) - held, 0),
                0,
                {},
                refused=str(error).splitlines()[0],
                **known,
            )
        account, text = compiled.memory_analysis(), compiled.as_text()
    return Report(
        len(devices),
        mesh_text,
        time.monotonic() - started,
        account.argument_size_in_bytes,
        account.output_size_in_bytes,
        account.alias_size_in_bytes,
        account.temp_size_in_bytes,
        account.generated_code_size_in_bytes,
        program.collectives(text, len(devices)),
        involuntary=tuple(program.involuntary("".join(said))),
        inside=program.phases_in(text),
        **known,
    )


def bytes_held(state: PyTree, mesh: Mesh) -> int:
    """Bytes of a state on one device of the mesh."""
    sizes = jax.tree.map(
        lambda x, at: math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize,
        state,
        sharding.of_state(state, mesh),
    )
    return sum(jax.tree.leaves(sizes))


def needed(text: str) -> int:
    """The bytes that the compiler asked for in vain, as far as it says.

    >>> needed(
    ...     "Ran out of memory on HBM, the total memory required for HLO temporaries (1.50G) exceeds available HBM (1.00G)."
    ... )
    1610612736
    """
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT])\)? (?:of|exceeds)", text)
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2]))) if found else 0


def matrices(params: PyTree, mesh: Mesh) -> frozenset[tuple[int, ...]]:
    """The dimensions in which the matrices among the parameters are computed with:
    whole, but for the part of the tensor axis; of scanned layers, those of all layers
    and those of one.
    """
    found = set()
    shapes, places = (
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(sharding.of_state(params, mesh)),
    )
    for (path, x), at in zip(shapes, places, strict=True):
        cut = [
            mesh.shape["tensor"] if axis == "tensor" else 1 for axis in (*at.spec, *[None] * x.ndim)
        ]
        dims = tuple(size // parts for size, parts in zip(x.shape, cut))
        scanned = any(part == jax.tree_util.DictKey("layers") for part in path)
        if len(dims) - scanned >= 2:
            found |= {dims, dims[1:]} if scanned else {dims}
    return frozenset(found)
