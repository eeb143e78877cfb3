"""`jaxppo plan`: does the step fit? Compile it for a TPU slice without the hardware.

The memory is the compiler's own account. Operations and bytes of each phase come from
the shapes, because the compiler counts the body of a loop once. Traffic over the links
comes from the program's collectives and the loops around them. With the chip's
published peaks they give a lower bound of the seconds.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import tyro

from jaxppo import pretrained, tasks
from jaxppo.config import RunConfig
from jaxppo.costs import chips, compiled, memory, phases, program
from jaxppo.costs.chips import GIB, Chip
from jaxppo.costs.compiled import Plan
from jaxppo.costs.program import Collective
from jaxppo.errors import UserError
from jaxppo.models.shapes import ModelConfig, gpt2, llama
from jaxppo.parallel import sharding
from jaxppo.run import files
from jaxppo.run.settings import read_config

LLAMA_7B = llama(
    vocab_size=32000, width=4096, num_layers=32, num_heads=32, num_kv_heads=32, max_length=4096
)
QWEN2_1_5B = llama(
    vocab_size=151936, width=1536, num_layers=28, num_heads=12, num_kv_heads=2, max_length=32768
)
SMOLLM2 = llama(
    vocab_size=49152, width=576, num_layers=30, num_heads=9, num_kv_heads=3, max_length=8192
)
SHAPES: dict[str, ModelConfig] = {
    "smollm2": dataclasses.replace(SMOLLM2, mlp_width=1536),
    "gpt2": gpt2(),
    "qwen2-1.5b": dataclasses.replace(QWEN2_1_5B, mlp_width=8960, qkv_bias=True),
    "llama-7b": dataclasses.replace(LLAMA_7B, mlp_width=11008, tied=False),
}

NOT_KNOWN = (
    "not known: the real length of responses (counted at full length without --mean-response), "
    "the cost of the reward, how "
    "much communication overlaps with computation, latency of the links, fragmentation, other "
    "programs on the chip, the host"
)


@dataclass(frozen=True)
class PlanOptions(RunConfig):
    """Check before a launch whether the whole step fits a TPU slice: memory, a lower
    bound of its seconds, collectives.

    $ jaxppo plan --topology v5e:2x4 --model smollm2 --batch-size 256
    $ jaxppo plan runs/sentiment/config.json --topology v6e:1x1
    $ jaxppo plan runs/translation/policy/config.json       # the second stage of a task
    $ jaxppo plan --config runs/sentiment/config.json --batch-size 256
    """

    RANGES: ClassVar = {"mean_response": "[0, inf)"}

    config: tyro.conf.Positional[Path | None] = None
    """config.json of a run, whose settings are taken as they are; to override some, use
    --config instead
    """
    record: tyro.conf.Suppress[Path | None] = None
    """the config.json of --config"""
    topology: str = ""
    """chip and size of the slice: v4, v5e, v5p or v6e, such as v5e:2x4; default: this
    machine's devices
    """
    mean_response: float = 0.0
    """mean length of responses, for operations and bytes; 0 = full length"""


def plan(options: PlanOptions) -> None:
    """Compile the step and print what it needs. Exit code 2 if it does not fit."""
    if options.topology and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # leave this machine's devices alone
    config: RunConfig = options
    shape = None
    if options.record and not options.model:
        shape = new_network(options.record)
    if options.config:
        if not options.config.exists():
            raise UserError(f"{options.config} is missing; give the config.json of a run")
        stored = read_config(RunConfig, options.config)
        config = dataclasses.replace(stored, mesh=options.mesh or stored.mesh)
        shape = None if config.model else new_network(options.config)
    chip, devices = None, []
    if options.topology:
        chip, devices = chips.topology(options.topology)
    devices = devices or chips.local_devices()
    shape = shape or shape_of(config.model)
    teacher = shape_of(config.teacher) if config.teacher not in ("", "self") else None
    report = compiled.compile_plan(
        config, shape, devices, mean_response=options.mean_response, teacher=teacher
    )
    print(report_text(config, shape, chip, report))
    if report.refused or (chip and not fits(chip, report)):
        raise SystemExit(2)


def new_network(path: Path) -> ModelConfig:
    """The shape of the new network that a task's settings describe. Raises UserError if
    its size depends on the data.
    """
    if read_config(RunConfig, path).model_kind == "classifier":
        raise UserError("a text classifier is no policy: there is nothing to plan")
    settings = read_config(tasks.TaskConfig, path)
    if settings.task == "speech":
        raise UserError(
            "the size of a speech network depends on its recordings: plan the config.json of the "
            "run's policy folder"
        )
    return tasks.new_network(settings)


def shape_of(name: str) -> ModelConfig:
    """A named shape, or that of a local folder: a run, or one with a config.json."""
    if name in SHAPES:
        return SHAPES[name]
    if (run := files.trained_run(name)) is not None:
        return shape_of(read_config(RunConfig, run / "config.json").model)
    if not (Path(name) / "config.json").exists():
        raise UserError(
            f"--model {name!r}: to plan, choose one of {', '.join(SHAPES)}, or a folder with a "
            "config.json"
        )
    return pretrained.read_shape(Path(name))


def report_text(config: RunConfig, shape: ModelConfig, chip: Chip | None, report: Plan) -> str:
    """The report as it is printed."""
    weights = sum(phases.matrix_parameters(shape))
    lines = [
        f"one program, with {', '.join(report.inside)}, for {report.devices} devices (mesh "
        f"{report.mesh}), compiled in {report.seconds:.0f} s; {weights / 1e6:.0f} M weights in "
        "products",
        f"per device: arguments {gib(report.arguments)}, outputs {gib(report.outputs)} "
        f"({gib(report.aliased)} of them in place), temporaries {gib(report.temporaries)}, "
        f"program {gib(report.code)}",
    ]
    if report.refused:
        lines = [
            f"the compiler gave up: {report.refused}",
            f"per device: arguments {gib(report.arguments)}",
        ]
    if report.adapters:
        where = f"of rank {config.lora} on {config.lora_on}"
        lines.append(f"{report.adapters:,} parameters of adapters {where} are trained")
    if chip:
        lines += fit_lines(config, chip, report)
    lines += time_lines(config, chip, report)
    lines += collective_lines(report)
    lines += warning_lines(config, report)
    return "\n".join([*lines, NOT_KNOWN])


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def fits(chip: Chip, report: Plan) -> bool:
    return not report.refused and report.peak <= chip.memory


def fit_lines(config: RunConfig, chip: Chip, report: Plan) -> list[str]:
    """Whether it fits and by how much; if that is tight, what would lower it."""
    good, share = fits(chip, report), report.peak / chip.memory
    line = (
        f"{'FITS' if good else 'DOES NOT FIT'}: {gib(report.peak)} of {gib(chip.memory)} on a "
        f"{chip.name} ({share:.0%}), {gib(abs(chip.memory - report.peak))} "
        f"{'left' if good else 'too much'}"
    )
    if not good and share <= 1:
        line = (
            f"DOES NOT FIT: the compiler does not say how much more than {gib(chip.memory)} of a "
            f"{chip.name} it needs"
        )
    if good and share <= 0.9:
        return [line]
    found = memory.suggestions(config, devices=report.devices, most=9)
    if report.arguments > chip.memory:  # smaller activations would not help
        found.sort(key=lambda option: not option.startswith(("--lora", "--mesh")))
    return [line, "what would lower it, in this order:", *(f"  {option}" for option in found[:3])]


def time_lines(config: RunConfig, chip: Chip | None, report: Plan) -> list[str]:
    """Operations and bytes of the phases, and lower bounds of their seconds."""
    bounds = program.time_bounds(chip, report.phases, report.collectives) if chip else {}
    lines, total = [], 0.0
    for name, (flops, moved) in report.phases.items():
        line = f"{name:10} {flops / 1e12:8.2f} TFLOP {moved / 1e9:8.2f} GB a device"
        if chip:
            binding = max(bounds[name], key=lambda means: bounds[name][means])
            total += bounds[name][binding]
            each = ", ".join(f"{means} {seconds:.3f}" for means, seconds in bounds[name].items())
            line += f"   at least {bounds[name][binding]:.3f} s, bound by {binding} ({each})"
        lines.append(line)
    if report.decode:
        parts = ", ".join(f"{name} {x / 1e9:.1f}" for name, x in report.decode.items())
        lines.append(f"the decode loop reads {sum(report.decode.values()) / 1e9:.1f} GB: {parts}")
        computed, real = report.positions
        lines.append(f"an epoch of the update computes {computed:,} positions for {real:,} tokens")
    if chip:
        rate = config.rows * (report.mean_response or config.response_length) / total
        lines.append(f"a step takes at least {total:.3f} s: {rate:.0f} tokens/s at most")
    return lines


def collective_lines(report: Plan, most: int = 8) -> list[str]:
    """The collectives that send most, with their loops, and the traffic of a token."""
    if not report.collectives:
        return [] if report.refused else ["no collectives"]
    sent = {x: x.sent * x.times * number for x, number in report.collectives.items()}
    total = sum(sent.values())
    largest = sorted(sent, key=lambda x: -sent[x])[:most]
    decoding = [x for x in sent if x.decoding]
    steps = lambda x: max(loop.times or 1 for loop in x.loops if loop.name == "decode")
    token = sum(sent[x] / steps(x) for x in decoding)
    return [
        f"collectives: {sum(report.collectives.values())} in the program; each device sends "
        f"{gib(total)} a step",
        *(
            f"  {gib(sent[x])}: {describe(x, report.collectives[x])}"
            for x in largest
            if sent[x] >= total / 100
        ),
        f"the decode loop sends {token / 2**20:.2f} MiB for each token of all rows, in "
        f"{len(decoding)} collectives",
    ]


def describe(x: Collective, number: int) -> str:
    """How often a collective runs, its kind, its size, and where it is."""
    often = "" if all(loop.exact for loop in x.loops) else "at most "
    where = " x ".join(f"{loop.name} {loop.times or '?'}" for loop in x.loops)
    place = f" in {x.phase}" * bool(x.phase) + f": {where}" * bool(where)
    size = f"{x.size / 2**20:.2f} MiB over {x.group} devices"
    return f"{often}{x.times * number} x {x.kind} of {size}{place}"


def moves_parameters(x: Collective, report: Plan) -> bool:
    """Whether a collective moves a large parameter: its array has the size and the
    largest dimension of one (the compiler may split and transpose the others). Sums in
    an update are gradients, which have the same shapes.
    """
    gradients = x.kind in ("all-reduce", "reduce-scatter")
    if x.size < sharding.LARGE or (gradients and x.phase not in ("generate", "reference")):
        return False
    same = lambda dims, matrix: math.prod(dims) == math.prod(matrix) and max(dims) == max(matrix)
    arrays = [dims for _, dims in x.arrays if dims]
    return any(same(dims, matrix) for dims in arrays for matrix in report.matrix_shapes)


def warning_lines(config: RunConfig, report: Plan) -> list[str]:
    """Traffic that should not be there, and parameters that a sharded mesh gathers."""
    lines = []
    if report.involuntary:
        some = ", ".join(list(dict.fromkeys(report.involuntary))[:3])
        lines.append(
            f"warning: {len(report.involuntary)} involuntary full rematerialisations: the compiler "
            f"gathers a whole tensor to shard it in another way, at {some}"
        )
    moving = [x for x in report.collectives if moves_parameters(x, report)]
    if "fsdp" in config.mesh or "tensor" in config.mesh:
        sent = lambda some: sum(x.sent * x.times * report.collectives[x] for x in some)
        if moving:
            decoding = [x for x in moving if x.decoding]
            lines.append(
                f"parameters cut up by the mesh are gathered for use: {gib(sent(moving))} a step, "
                f"{gib(sent(decoding))} of it in the decode loop, again for each token"
            )
        return lines
    for x in moving:
        where = f"in {x.phase}" if x.phase else "once a step"
        where = "in the decode loop, for each token" if x.decoding else where
        lines.append(
            f"warning: an {x.kind} of {x.size / 2**20:.0f} MiB {where} moves parameters; "
            "moving gradients would suffice"
        )
    return lines
