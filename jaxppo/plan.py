"""Does the step fit, before anything is paid for: the WHOLE step is compiled ahead of time for a TPU slice that is not there.

The memory is the compiler's own account for that chip. Operations and bytes of each phase are counted from the shapes, since the
compiler's estimate counts a loop's body once, whatever its trip count; what goes over the links is counted from the program's
collectives and the loops around them. With the chip's published peaks they give a lower bound of seconds. What it cannot know is
listed at the end of the report.
"""

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxppo import algorithms, chips, costs, memory, parallel, policy, ppo, program, rewards, sharding, train
from jaxppo.chips import GIB, Chip
from jaxppo.config import ModelConfig, RunConfig, validate
from jaxppo.models import lora
from jaxppo.program import Collective
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
    involuntary: tuple[str, ...] = ()  # operations at which the compiler gathers a whole tensor to cut it another way
    inside: tuple[str, ...] = ()  # the phases that are parts of this one program
    refused: str = ""  # what the compiler said, if it gave up for want of memory; then `temporaries` is all beside the arguments

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def abstract_state(config: RunConfig, shape: ModelConfig) -> tuple[Any, TrainState]:
    """(model, the state's shapes): no array is made."""
    model, _ = train.make_model(config, shape)
    params = jax.eval_shape(model.init, jax.random.key(0))
    if config.lora:
        trained, base = lora.split(params, lora.is_adapter)
        frozen = {"base": jax.eval_shape(lambda p: policy.cast(p, model.dtype), base), "reference": None, "reward": {}}
    else:
        trained = params
        frozen = {"base": {}, "reference": {name: x for name, x in params.items() if name != "critic"}, "reward": {}}
    make = lambda trained, frozen, key: ppo.init_state(config, trained, frozen, key)
    return model, jax.eval_shape(make, trained, frozen, jax.random.key(0))


def compile_plan(config: RunConfig, shape: ModelConfig, devices: list) -> Report:
    """The whole step, compiled for these devices and taken apart. The reward counts a token: a reward model comes on top."""
    mesh_text = config.mesh or f"data={len(devices)}"
    mesh = sharding.make_mesh(mesh_text, devices)
    validate(config, devices=mesh.shape["data"] * mesh.shape["fsdp"])
    model, state = abstract_state(config, shape)
    parts = algorithms.make_parts(config, rewards.count_token(1))
    step = parallel.MeshStep(ppo.make_train_step(model, parts, config), mesh)
    integer: Any = jax.ShapeDtypeStruct((config.rows, config.prompt_length), jnp.int32)
    mask: Any = jax.ShapeDtypeStruct(integer.shape, bool)
    index: Any = jax.ShapeDtypeStruct((config.rows,), jnp.int32)
    extra: dict[str, Any] = {"task": index} if config.num_tasks > 1 else {}
    if shape.context_width:
        extra["context"] = jax.ShapeDtypeStruct((config.rows, shape.context_length, shape.context_width), jnp.float32)
        extra["context_length"] = index
    started = time.monotonic()
    known: dict[str, Any] = {
        "phases": costs.phases(config, shape, mesh),
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
                len(devices), mesh_text, time.monotonic() - started, held, 0, 0, max(needed(str(error)) - held, 0), 0, {},
                refused=str(error).splitlines()[0], **known,
            )  # fmt: skip
        account, text = compiled.memory_analysis(), compiled.as_text()
    return Report(
        len(devices), mesh_text, time.monotonic() - started, account.argument_size_in_bytes, account.output_size_in_bytes,
        account.alias_size_in_bytes, account.temp_size_in_bytes, account.generated_code_size_in_bytes,
        program.collectives(text, len(devices)), involuntary=tuple(program.involuntary("".join(said))),
        inside=program.phases_in(text), **known,
    )  # fmt: skip


def bytes_held(state: PyTree, mesh: Mesh) -> int:
    """Bytes of a state on one device of the mesh."""
    sizes = jax.tree.map(
        lambda x, at: math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize, state, sharding.of_state(state, mesh)
    )
    return sum(jax.tree.leaves(sizes))


def needed(text: str) -> int:
    """The bytes that the compiler asked for in vain, as far as it says.

    >>> needed("Ran out of memory on HBM, the total memory required for HLO temporaries (1.50G) exceeds available HBM (1.00G).")
    1610612736
    """
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT])\)? (?:of|exceeds)", text)
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2]))) if found else 0


def matrices(params: PyTree, mesh: Mesh) -> frozenset[tuple[int, ...]]:
    """The dimensions in which the matrices among the parameters are computed with: whole, but for the part of the tensor axis; of
    scanned layers, those of all layers and those of one."""
    found = set()
    shapes, places = jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(sharding.of_state(params, mesh))
    for (path, x), at in zip(shapes, places, strict=True):
        cut = [mesh.shape["tensor"] if axis == "tensor" else 1 for axis in (*at.spec, *[None] * x.ndim)]
        dims = tuple(size // parts for size, parts in zip(x.shape, cut))
        scanned = any(part == jax.tree_util.DictKey("layers") for part in path)
        if len(dims) - scanned >= 2:
            found |= {dims, dims[1:]} if scanned else {dims}
    return frozenset(found)


def text_of(config: RunConfig, shape: ModelConfig, chip: Chip | None, report: Report) -> str:
    """The report as it is printed."""
    blocks, head = costs.matrix_parameters(shape)
    lines = [
        f"one program, with {', '.join(report.inside)}, for {report.devices} devices (mesh {report.mesh}), compiled in "
        f"{report.seconds:.0f} s; {(blocks + head) / 1e6:.0f} M weights in products"
    ]
    if report.refused:
        lines = [f"the compiler gave up: {report.refused}", f"per device: arguments {gib(report.arguments)}"]
    else:
        lines.append(
            f"per device: arguments {gib(report.arguments)}, outputs {gib(report.outputs)} ({gib(report.aliased)} of them in "
            f"place), temporaries {gib(report.temporaries)}, program {gib(report.code)}"
        )
    if chip:
        lines += verdict(config, chip, report)
    lines += times(config, chip, report) + exchanges(report) + remarks(config, report)
    lines.append(
        "not known: how long responses really are (counted at full length), the reward's own cost, how far exchange hides behind "
        "computation, routes and latency of the links, fragmentation, other programs on the chip, the host"
    )
    return "\n".join(lines)


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def fits(chip: Chip, report: Report) -> bool:
    return not report.refused and report.peak <= chip.memory


def verdict(config: RunConfig, chip: Chip, report: Report) -> list[str]:
    """Whether it fits, by how much, and what would lower it when that is tight."""
    good, share = fits(chip, report), report.peak / chip.memory
    lines = [
        f"{'FITS' if good else 'DOES NOT FIT'}: {gib(report.peak)} of {gib(chip.memory)} on a {chip.name} ({share:.0%}), "
        f"{gib(abs(chip.memory - report.peak))} {'left' if good else 'too much'}"
    ]
    if not good and share <= 1:
        lines = [f"DOES NOT FIT: the compiler does not say how much more than {gib(chip.memory)} of a {chip.name} it wants"]
    if good and share <= 0.9:
        return lines
    found = memory.cures(config, devices=report.devices, most=9)
    if report.arguments > chip.memory:  # smaller activations would not help
        found.sort(key=lambda cure: not cure.startswith(("--lora", "--mesh")))
    return [*lines, "what would lower it, in this order:", *(f"  {cure}" for cure in found[:3])]


def times(config: RunConfig, chip: Chip | None, report: Report) -> list[str]:
    """Operations and bytes of the phases, and how long they take at least."""
    found = costs.bounds(chip, report.phases, report.collectives) if chip else {}
    lines, total = [], 0.0
    for name, (flops, moved) in report.phases.items():
        line = f"{name:10} {flops / 1e12:8.2f} TFLOP {moved / 1e9:8.2f} GB a device"
        if chip:
            binding = max(found[name], key=lambda means: found[name][means])
            total += found[name][binding]
            each = ", ".join(f"{means} {seconds:.3f}" for means, seconds in found[name].items())
            line += f"   at least {found[name][binding]:.3f} s, bound by {binding} ({each})"
        lines.append(line)
    if chip:
        lines.append(f"a step takes at least {total:.3f} s: {config.rows * config.response_length / total:.0f} tokens/s at most")
    return lines


def exchanges(report: Report, most: int = 8) -> list[str]:
    """The collectives that move most, with the loops that they stand in; and what each token costs."""
    if not report.collectives:
        return [] if report.refused else ["no collectives"]
    moved = {x: x.sent * x.times * number for x, number in report.collectives.items()}
    total = sum(moved.values())
    lines = [f"collectives: {sum(report.collectives.values())} in the program; each device sends {gib(total)} a step"]
    for x in sorted(moved, key=lambda x: -moved[x])[:most]:
        if moved[x] >= total / 100:
            lines.append(f"  {gib(moved[x])}: {described(x, report.collectives[x])}")
    decoding = [x for x in moved if x.decoding]
    sent = sum(moved[x] / max(loop.times or 1 for loop in x.loops if loop.name == "decode") for x in decoding)
    return [*lines, f"the decode loop sends {sent / 2**20:.2f} MiB for each token of all rows, in {len(decoding)} collectives"]


def described(x: Collective, number: int) -> str:
    """How often, what, how large, and where."""
    often = "" if all(loop.exact for loop in x.loops) else "at most "
    where = " x ".join(f"{loop.name} {loop.times or '?'}" for loop in x.loops)
    place = f" in {x.phase}" * bool(x.phase) + f": {where}" * bool(where)
    return f"{often}{x.times * number} x {x.kind} of {x.size / 2**20:.2f} MiB over {x.group} devices{place}"


def moves_parameters(x: Collective, report: Report) -> bool:
    """Whether a collective moves a large parameter as it is: an array of as many numbers with the same largest dimension (the
    compiler splits and turns the others). What an update sums up are gradients, of the same shapes."""
    if x.size < sharding.LARGE or (x.kind in ("all-reduce", "reduce-scatter") and x.phase not in ("generate", "reference")):
        return False
    same = lambda dims, matrix: math.prod(dims) == math.prod(matrix) and max(dims) == max(matrix)
    return any(dims and same(dims, matrix) for _, dims in x.arrays for matrix in report.matrices)


def remarks(config: RunConfig, report: Report) -> list[str]:
    """What moves although it need not; and what moves because the mesh cuts parameters up."""
    lines = []
    if report.involuntary:
        some = ", ".join(list(dict.fromkeys(report.involuntary))[:3])
        lines.append(
            f"warning: {len(report.involuntary)} involuntary full rematerialisations: the compiler gathers a whole tensor "
            f"to cut it another way, at {some}"
        )
    moving = [x for x in report.collectives if moves_parameters(x, report)]
    if "fsdp" in config.mesh or "tensor" in config.mesh:
        sent = lambda some: sum(x.sent * x.times * report.collectives[x] for x in some)
        decoding = [x for x in moving if x.decoding]
        if moving:
            lines.append(
                f"parameters cut up by the mesh are gathered for use: {gib(sent(moving))} a step, {gib(sent(decoding))} of it in "
                "the decode loop, anew for each token"
            )
        return lines
    for x in moving:
        where = "in the decode loop, for each token" if x.decoding else f"in {x.phase}" if x.phase else "once a step"
        lines.append(f"warning: an {x.kind} of {x.size / 2**20:.0f} MiB {where} moves parameters where gradients would do")
    return lines
