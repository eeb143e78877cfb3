"""Compile a step ahead of time, and read its memory and its collectives."""

import dataclasses
import math
import re
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxppo import algorithms, models, parallel, policy, ppo
from jaxppo.config import RunConfig, validate
from jaxppo.costs import chips, phases, program
from jaxppo.costs.program import Collective
from jaxppo.models import int8, lora
from jaxppo.models.shapes import ModelConfig
from jaxppo.parallel import sharding
from jaxppo.rewards import in_program
from jaxppo.types import Model, Prompts, PyTree, TrainState


@dataclass(frozen=True)
class Plan:
    """What a compiled step needs on each device; sizes in bytes."""

    devices: int
    mesh: str
    seconds: float = 0.0  # to compile
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0  # outputs that overwrite arguments
    temporaries: int = 0
    code: int = 0  # the program itself
    collectives: dict[Collective, int] = field(default_factory=dict)  # how many of each
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)  # (operations, bytes)
    matrix_shapes: frozenset[tuple[int, ...]] = frozenset()  # of the parameters
    involuntary: tuple[str, ...] = ()  # `program.rematerialisations`
    inside: tuple[str, ...] = ()  # the phases that this program has
    # The compiler's message when memory did not suffice; `temporaries` is then all that
    # comes on top of the arguments.
    refused: str = ""
    mean_response: float = 0.0  # 0 = full length
    decode: dict[str, float] = field(default_factory=dict)  # bytes read: `phases.decode_bytes`
    # of an epoch of the update: computed, and with tokens
    positions: tuple[int, int] = (0, 0)
    adapters: int = 0  # their parameters, whole

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def abstract_state(
    config: RunConfig, shape: ModelConfig, teacher: Model | None = None
) -> tuple[Model, TrainState]:
    """The model and the shapes of a run's first state; nothing is computed. The weights
    of a teacher are its own.
    """
    model, _ = models.make_model(config, shape)

    def make(key):
        trained, base = model.init(key), {}
        reference = {name: x for name, x in trained.items() if name != "critic"}
        still = int8.quantise if config.base_dtype == "int8" else lambda params: params
        if config.lora:
            trained, base = lora.split(trained, lora.is_trained)
            base, reference = policy.cast(still(base), model.dtype), None
        else:
            reference = still(reference)
        frozen = {"base": base, "reference": reference, "reward": {}}
        if teacher is not None:
            frozen["teacher"] = policy.cast(teacher.init(key), teacher.dtype)
        return ppo.init_state(config, trained, frozen, key)

    return model, jax.eval_shape(make, jax.random.key(0))


def abstract_prompts(config: RunConfig, shape: ModelConfig) -> Prompts:
    """The shapes of a step's prompts."""
    array: Any = jax.ShapeDtypeStruct
    index = array((config.rows,), jnp.int32)
    extra: dict[str, Any] = {"task": index} if config.num_tasks > 1 else {}
    if shape.context_width:
        size = (config.rows, shape.context_length, shape.context_width)
        extra |= {"context": array(size, jnp.float32), "context_length": index}
    size = (config.rows, config.prompt_length)
    return Prompts(array(size, jnp.int32), array(size, bool), index, extra)


def compile_plan(
    config: RunConfig,
    shape: ModelConfig,
    devices: list,
    *,
    mean_response: float = 0.0,
    teacher: ModelConfig | None = None,
) -> Plan:
    """Compile the whole step for these devices. Its reward only counts a token: a
    reward model comes on top. Operations and bytes are those of responses of this mean
    length, those of a teacher's reading left out; 0 is full length. A teacher without a
    shape is the policy's own start.
    """
    mesh_text = config.mesh or f"data={len(devices)}"
    mesh = sharding.make_mesh(mesh_text, devices)
    validate(config, devices=mesh.shape["data"] * mesh.shape["fsdp"])
    # the table of stop texts needs the tokenizer; it is small, and decoding may take
    # its full length
    config = dataclasses.replace(config, stop=())
    reads = teacher and models.make(teacher, dtype=config.dtype, scan=config.scan_layers)
    model, state = abstract_state(config, shape, reads)
    parts = algorithms.make_parts(config, in_program.count_token(1))
    if config.teacher:
        parts = parts._replace(teacher=reads or model)
    step = parallel.MeshStep(ppo.make_train_step(model, parts, config), mesh)
    lengths = phases.device_lengths(config, mesh, mean_response)
    decoding = phases.decoding(config, lengths, packs=phases.is_packed(config, shape))
    started = time.monotonic()
    plan = Plan(
        len(devices),
        mesh_text,
        mean_response=mean_response,
        arguments=state_bytes(state, mesh),
        phases=phases.phase_costs(config, shape, mesh, mean_response),
        decode=phases.decode_bytes(config, shape, mesh, decoding),
        positions=phases.update_positions(config, shape, mesh, mean_response),
        adapters=lora.count_adapters(state.params),
        matrix_shapes=matrix_shapes((state.params, state.frozen["base"]), mesh),
    )
    with chips.capture_stderr() as said:
        lowered = step.lower(step.build(state), abstract_prompts(config, shape))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return dataclasses.replace(
                plan,
                seconds=time.monotonic() - started,
                temporaries=max(bytes_requested(str(error)) - plan.arguments, 0),
                refused=str(error).splitlines()[0],
            )
        account, text = compiled.memory_analysis(), compiled.as_text()
    return dataclasses.replace(
        plan,
        seconds=time.monotonic() - started,
        arguments=account.argument_size_in_bytes,
        outputs=account.output_size_in_bytes,
        aliased=account.alias_size_in_bytes,
        temporaries=account.temp_size_in_bytes,
        code=account.generated_code_size_in_bytes,
        collectives=program.collectives(text, len(devices), loop_trips(config, shape)),
        involuntary=tuple(program.rematerialisations("".join(said))),
        inside=program.phases_in(text),
    )


def loop_trips(config: RunConfig, shape: ModelConfig) -> dict[str, int]:
    """How often the step's loops run at most, by their `jax.named_scope`s."""
    return {
        "decode": config.response_length - 1,  # the prompt gives the first token
        "epochs": config.epochs,
        "minibatches": config.minibatches,
        "microbatches": config.microbatches,
        "fewer_rows": 0,  # instead of decode, which is counted at full length
        "layers": shape.num_layers,
    }


def state_bytes(state: PyTree, mesh: Mesh) -> int:
    """Bytes of a state on one device of the mesh."""
    sizes = jax.tree.map(
        lambda x, at: math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize,
        state,
        sharding.state_shardings(state, mesh),
    )
    return sum(jax.tree.leaves(sizes))


def bytes_requested(text: str) -> int:
    """The bytes in the compiler's message about too little memory, or 0.

    >>> bytes_requested("total memory required (1.50G) exceeds available HBM (1.00G)")
    1610612736
    """
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT])\)? (?:of|exceeds)", text)
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2]))) if found else 0


def matrix_shapes(params: PyTree, mesh: Mesh) -> frozenset[tuple[int, ...]]:
    """The shapes of weight matrices in computations: whole over data and fsdp, cut over
    the tensor axis; of scanned layers, of all together and of one.
    """
    found = set()
    shapes, places = (
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(sharding.state_shardings(params, mesh)),
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
