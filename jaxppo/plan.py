"""Does the step fit, before anything is paid for: the WHOLE step is compiled ahead of time for a TPU slice that is not there.

The memory is the compiler's own account for that chip. Operations and bytes of each phase are counted from the shapes, since the
compiler's estimate counts a loop's body once, whatever its trip count; with the chip's published peaks they give a lower
bound of seconds. What it cannot know is listed at the end of the report.
"""

import contextlib
import dataclasses
import math
import os
import re
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxppo import algorithms, parallel, policy, ppo, pretrained, rewards, sharding, train
from jaxppo.config import ModelConfig, RunConfig, UserError, gpt2, llama, validate
from jaxppo.models import lora
from jaxppo.types import Prompts, TrainState

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published peaks of one chip (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""

    name: str
    memory: float  # bytes
    flops: float  # a second, in bfloat16
    bandwidth: float  # bytes a second, of the memory


CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 275e12, 1228e9),
    "v5e": Chip("TPU v5e", 16 * GIB, 197e12, 819e9),
    "v5p": Chip("TPU v5p", 95 * GIB, 459e12, 2765e9),
    "v6e": Chip("TPU v6e", 32 * GIB, 918e12, 1640e9),
}
SHAPES: dict[str, ModelConfig] = {
    "smollm2": dataclasses.replace(
        llama(vocab_size=49152, width=576, num_layers=30, num_heads=9, num_kv_heads=3, max_length=8192), mlp_width=1536
    ),
    "gpt2": gpt2(),
    "qwen2-1.5b": dataclasses.replace(
        llama(vocab_size=151936, width=1536, num_layers=28, num_heads=12, num_kv_heads=2, max_length=32768), mlp_width=8960,
        qkv_bias=True,
    ),
    "llama-7b": dataclasses.replace(
        llama(vocab_size=32000, width=4096, num_layers=32, num_heads=32, num_kv_heads=32, max_length=4096), mlp_width=11008,
        tied=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a compiled step needs, on each device."""

    devices: int
    mode: str
    seconds: float  # to compile
    arguments: int
    outputs: int
    aliased: int  # outputs written over arguments
    temporaries: int
    collectives: dict[tuple[str, int], int]  # (kind, bytes of the result) -> how many stand in the program
    phases: dict[str, tuple[float, float]]  # (operations, bytes), on each device

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


def shape_of(name: str) -> ModelConfig:
    """A named shape, or that of a local folder's config.json."""
    if name in SHAPES:
        return SHAPES[name]
    if not (Path(name) / "config.json").exists():
        raise UserError(f"--model {name!r}: to plan, choose one of {', '.join(SHAPES)}, or a folder with a config.json")
    return pretrained.shape_of(Path(name))


def topology(text: str) -> tuple[Chip, list]:
    """The chip and the devices of a slice such as v5e:2x4, which need not be here."""
    kind, _, size = text.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", size):
        raise UserError(f"--topology {text!r}: give CHIP:SIZE with one of {', '.join(CHIPS)}, such as v5e:2x4 or v5p:2x2x2")
    # No metadata server is asked, and two plans at once do not wait for each other.
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3"}.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        with quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=text)
    except Exception as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"--topology {text}: {reason}; it needs the TPU compiler: pip install 'jaxppo[tpu-plan]'") from error
    return CHIPS[kind], list(found.devices)


@contextlib.contextmanager
def quiet():
    """Nothing on the terminal from a library that complains of the missing chip; what it said comes with an exception."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            # A cached program cannot be loaded without its chip: JAX says so, and compiles it again.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*compilation cache")
                yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


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
    prompts = Prompts(integer, mask, index)
    started = time.monotonic()
    with quiet():
        compiled = step.lower(step.abstract(state), prompts).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Report(
        len(devices), f"mesh {mesh_text}", time.monotonic() - started, memory.argument_size_in_bytes,
        memory.output_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes, collectives(text),
        phases(config, shape, mesh),
    )  # fmt: skip


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}  # others: 4


def collectives(text: str) -> dict[tuple[str, int], int]:
    """Kind and size of every collective in a program's text, and how often each stands there. A loop's body counts once.

    >>> collectives("  %x = f32[4,8]{1,0} all-reduce(%y), to_apply=%add\\n  %z = bf16[2]{0} all-gather-start(%w)")
    {('all-reduce', 128): 1, ('all-gather', 4): 1}
    """
    found: Counter = Counter()
    for line in text.splitlines():
        match = re.search(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(", line)
        if match:
            size = 0
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                size += BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
            found[match[2], size] += 1
    return dict(found)


def matrix_parameters(shape: ModelConfig) -> tuple[int, int]:
    """(weights of the blocks' products, weights of the head)."""
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    block = shape.width * (2 * heads + 2 * kv) + shape.width * shape.mlp_width * (3 if shape.gated else 2)
    return shape.num_layers * block, shape.width * shape.vocab_size


def phases(config: RunConfig, shape: ModelConfig, mesh: Mesh) -> dict[str, tuple[float, float]]:
    """Operations and bytes of each phase on each device, from the shapes: 2 operations a weight and token forward, twice that
    backward (once with adapters, whose weight gradients are small); attention 4 · width a pair of tokens. Bytes are those of
    the weights, once a decoded token, and of the keys and values read."""
    blocks, head = matrix_parameters(shape)
    size = jnp.dtype(config.dtype).itemsize
    rows, length, response = config.rows, config.length, config.response_length
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * length * length / 2
    forward = rows * (2 * blocks * length + 2 * head * response + attention)
    cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size * rows * (config.prompt_length + response / 2)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    devices = math.prod(mesh.shape.values())
    # Each device reads the weights that it computes with: all of them, but for the part of the tensor axis.
    weights = (blocks + head) * size / tensor
    passes = 2 if config.lora else 3
    learned = config.batch_size / config.rows * config.epochs
    moments = 0 if config.lora else (blocks + head) * 4 * 7 / (tensor * fsdp)  # Adam reads four arrays and writes three
    updates = config.epochs * config.minibatches
    return {
        "generate": (forward / devices, response * weights + response * cache / devices),
        "reference": (forward / devices, weights),
        "update": (passes * learned * forward / devices, updates * (passes * weights * config.microbatches + moments)),
    }


def cures(config: RunConfig, report: Report) -> list[str]:
    """Settings that lower the memory, the cheapest first."""
    rows = config.batch_size // config.minibatches
    out = []
    if config.remat == "none":
        out.append("--remat block (activations are computed twice)")
    if rows // config.group_size > config.microbatches:
        out.append(f"--microbatches {config.microbatches * 2} (a minibatch's gradient in more parts)")
    if not config.lora:
        out.append("--lora 8 (one copy of the weights, no moments for them)")
    if report.devices > 1 and "fsdp" not in config.mesh:
        out.append(f"--mesh fsdp={report.devices} (parameters and moments cut up)")
    if config.dtype == "float32":
        out.append("--dtype bfloat16 (activations and cache of half the size)")
    out.append(f"--batch-size {max(config.batch_size // 2, config.minibatches * config.group_size)}")
    return out[:3]


def text_of(config: RunConfig, shape: ModelConfig, chip: Chip | None, report: Report) -> str:
    """The report as it is printed."""
    gib = lambda x: f"{x / GIB:.2f} GiB"
    blocks, head = matrix_parameters(shape)
    lines = [
        f"one program for {report.devices} devices ({report.mode}), compiled in {report.seconds:.0f} s; "
        f"{(blocks + head) / 1e6:.0f} M weights in products",
        f"per device: arguments {gib(report.arguments)}, outputs {gib(report.outputs)} ({gib(report.aliased)} of them in place), "
        f"temporaries {gib(report.temporaries)}",
    ]
    if chip:
        fits = report.peak <= chip.memory
        share = report.peak / chip.memory
        lines.append(
            f"{'FITS' if fits else 'DOES NOT FIT'}: {gib(report.peak)} of {gib(chip.memory)} on a {chip.name} ({share:.0%}), "
            f"{gib(abs(chip.memory - report.peak))} {'left' if fits else 'too much'}"
        )
        if share > 0.9:
            lines += ["what would lower it, in this order:", *(f"  {cure}" for cure in cures(config, report))]
    total = 0.0
    for name, (flops, moved) in report.phases.items():
        line = f"{name:10} {flops / 1e12:8.2f} TFLOP {moved / 1e9:8.2f} GB a device"
        if chip:
            compute, memory = flops / chip.flops, moved / chip.bandwidth
            total += max(compute, memory)
            line += f"   at least {max(compute, memory):.3f} s, bound by {'compute' if compute > memory else 'memory'}"
        lines.append(line)
    if chip:
        lines.append(f"a step takes at least {total:.3f} s: {config.rows * config.response_length / total:.0f} tokens/s at most")
    lines.append("collectives in the program (a loop's body counts once):" if report.collectives else "no collectives")
    for (kind, size), number in sorted(report.collectives.items(), key=lambda item: -item[0][1])[:8]:
        lines.append(f"  {number:4} x {kind} of {size / 2**20:.2f} MiB")
    lines += remarks(config, shape, report)
    lines.append(
        "not known: the reward's own cost, fragmentation, other programs on the chip, time on the links between chips, the host"
    )
    return "\n".join(lines)


def remarks(config: RunConfig, shape: ModelConfig, report: Report) -> list[str]:
    """All-gathers of large parameters in a run that has every parameter on every device anyway."""
    if "fsdp" in config.mesh or "tensor" in config.mesh:
        return []
    largest = max(shape.width * shape.vocab_size, shape.width * shape.mlp_width) * jnp.dtype(config.dtype).itemsize
    moved = [size for kind, size in report.collectives if kind == "all-gather" and size >= largest]
    return [f"warning: an all-gather of {size / 2**20:.0f} MiB moves parameters where gradients would do" for size in moved]
