"""Does the step fit, before anything is paid for: the WHOLE step is compiled ahead of
time for a TPU slice that is not there.

The memory is the compiler's own account for that chip. Operations and bytes of each
phase are counted from the shapes, since the compiler's estimate counts a loop's body
once, whatever its trip count; what goes over the links is counted from the program's
collectives and the loops around them. With the chip's published peaks they give a lower
bound of seconds. What it cannot know is listed at the end of the report.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

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
from jaxppo.run.settings import read_config


def report_text(config: RunConfig, shape: ModelConfig, chip: Chip | None, report: Plan) -> str:
    """The report as it is printed."""
    blocks, head = phases.matrix_parameters(shape)
    lines = [
        f"one program, with {', '.join(report.inside)}, for {report.devices} devices (mesh {report.mesh}), compiled in "
        f"{report.seconds:.0f} s; {(blocks + head) / 1e6:.0f} M weights in products"
    ]
    if report.refused:
        lines = [
            f"the compiler gave up: {report.refused}",
            f"per device: arguments {gib(report.arguments)}",
        ]
    else:
        lines.append(
            f"per device: arguments {gib(report.arguments)}, outputs {gib(report.outputs)} ({gib(report.aliased)} of them in "
            f"place), temporaries {gib(report.temporaries)}, program {gib(report.code)}"
        )
    if chip:
        lines += fit_lines(config, chip, report)
    lines += (
        time_lines(config, chip, report) + collective_lines(report) + warning_lines(config, report)
    )
    lines.append(
        "not known: how long responses really are (counted at full length), the reward's own cost, how far exchange hides behind "
        "computation, routes and latency of the links, fragmentation, other programs on the chip, the host"
    )
    return "\n".join(lines)


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def fits(chip: Chip, report: Plan) -> bool:
    return not report.refused and report.peak <= chip.memory


def fit_lines(config: RunConfig, chip: Chip, report: Plan) -> list[str]:
    """Whether it fits, by how much, and what would lower it when that is tight."""
    good, share = fits(chip, report), report.peak / chip.memory
    lines = [
        f"{'FITS' if good else 'DOES NOT FIT'}: {gib(report.peak)} of {gib(chip.memory)} on a {chip.name} ({share:.0%}), "
        f"{gib(abs(chip.memory - report.peak))} {'left' if good else 'too much'}"
    ]
    if not good and share <= 1:
        lines = [
            f"DOES NOT FIT: the compiler does not say how much more than {gib(chip.memory)} of a {chip.name} it wants"
        ]
    if good and share <= 0.9:
        return lines
    found = memory.suggestions(config, devices=report.devices, most=9)
    if report.arguments > chip.memory:  # smaller activations would not help
        found.sort(key=lambda cure: not cure.startswith(("--lora", "--mesh")))
    return [*lines, "what would lower it, in this order:", *(f"  {cure}" for cure in found[:3])]


def time_lines(config: RunConfig, chip: Chip | None, report: Plan) -> list[str]:
    """Operations and bytes of the phases, and how long they take at least."""
    found = program.time_bounds(chip, report.phases, report.collectives) if chip else {}
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
        lines.append(
            f"a step takes at least {total:.3f} s: {config.rows * config.response_length / total:.0f} tokens/s at most"
        )
    return lines


def collective_lines(report: Plan, most: int = 8) -> list[str]:
    """The collectives that move most, with the loops that they stand in; and what each
    token costs.
    """
    if not report.collectives:
        return [] if report.refused else ["no collectives"]
    moved = {x: x.sent * x.times * number for x, number in report.collectives.items()}
    total = sum(moved.values())
    lines = [
        f"collectives: {sum(report.collectives.values())} in the program; each device sends {gib(total)} a step"
    ]
    for x in sorted(moved, key=lambda x: -moved[x])[:most]:
        if moved[x] >= total / 100:
            lines.append(f"  {gib(moved[x])}: {described(x, report.collectives[x])}")
    decoding = [x for x in moved if x.decoding]
    sent = sum(
        moved[x] / max(loop.times or 1 for loop in x.loops if loop.name == "decode")
        for x in decoding
    )
    return [
        *lines,
        f"the decode loop sends {sent / 2**20:.2f} MiB for each token of all rows, in {len(decoding)} collectives",
    ]


def described(x: Collective, number: int) -> str:
    """How often, what, how large, and where."""
    often = "" if all(loop.exact for loop in x.loops) else "at most "
    where = " x ".join(f"{loop.name} {loop.times or '?'}" for loop in x.loops)
    place = f" in {x.phase}" * bool(x.phase) + f": {where}" * bool(where)
    return f"{often}{x.times * number} x {x.kind} of {x.size / 2**20:.2f} MiB over {x.group} devices{place}"


def moves_parameters(x: Collective, report: Plan) -> bool:
    """Whether a collective moves a large parameter as it is: an array of as many
    numbers with the same largest dimension (the compiler splits and turns the others).
    What an update sums up are gradients, of the same shapes.
    """
    if x.size < sharding.LARGE or (
        x.kind in ("all-reduce", "reduce-scatter") and x.phase not in ("generate", "reference")
    ):
        return False
    same = lambda dims, matrix: math.prod(dims) == math.prod(matrix) and max(dims) == max(matrix)
    return any(dims and same(dims, matrix) for _, dims in x.arrays for matrix in report.matrices)


def warning_lines(config: RunConfig, report: Plan) -> list[str]:
    """What moves although it need not; and what moves because the mesh cuts parameters
    up.
    """
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
        where = (
            "in the decode loop, for each token"
            if x.decoding
            else f"in {x.phase}"
            if x.phase
            else "once a step"
        )
        lines.append(
            f"warning: an {x.kind} of {x.size / 2**20:.0f} MiB {where} moves parameters where gradients would do"
        )
    return lines


SHAPES: dict[str, ModelConfig] = {
    "smollm2": dataclasses.replace(
        llama(
            vocab_size=49152, width=576, num_layers=30, num_heads=9, num_kv_heads=3, max_length=8192
        ),
        mlp_width=1536,
    ),
    "gpt2": gpt2(),
    "qwen2-1.5b": dataclasses.replace(
        llama(
            vocab_size=151936,
            width=1536,
            num_layers=28,
            num_heads=12,
            num_kv_heads=2,
            max_length=32768,
        ),
        mlp_width=8960,
        qkv_bias=True,
    ),
    "llama-7b": dataclasses.replace(
        llama(
            vocab_size=32000,
            width=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            max_length=4096,
        ),
        mlp_width=11008,
        tied=False,
    ),
}


def shape_of(name: str) -> ModelConfig:
    """A named shape, or that of a local folder's config.json."""
    if name in SHAPES:
        return SHAPES[name]
    if not (Path(name) / "config.json").exists():
        raise UserError(
            f"--model {name!r}: to plan, choose one of {', '.join(SHAPES)}, or a folder with a config.json"
        )
    return pretrained.read_shape(Path(name))


@dataclass(frozen=True)
class PlanOptions(RunConfig):
    """Whether the whole step fits a TPU slice, before it is launched: memory, a lower
    bound of seconds, collectives.

    $ jaxppo plan --topology v5e:2x4 --model smollm2 --batch-size 256
    $ jaxppo plan runs/sentiment/config.json --topology v6e:1x1
    $ jaxppo plan runs/translation/policy/config.json              # of a task: its second stage
    """

    config: tyro.conf.Positional[Path | None] = None
    """config.json of a run, of any script, whose settings to take as they are; --config
    takes settings that options override
    """
    topology: str = ""
    """chip and size of the slice: v4, v5e, v5p or v6e, such as v5e:2x4; without it the
    devices that are here
    """


def plan(options: PlanOptions) -> None:
    """Compile the step ahead of time and print what it needs."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if options.topology else "")
    if not os.environ["JAX_PLATFORMS"]:
        del os.environ["JAX_PLATFORMS"]
    chosen: RunConfig = options
    if options.config:
        if not options.config.exists():
            raise UserError(f"{options.config} is missing; give the config.json of a run")
        stored = read_config(RunConfig, options.config)
        chosen = dataclasses.replace(stored, mesh=options.mesh or stored.mesh)
    # the compiler's warnings are read, not shown
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"

    chip, devices = (
        chips.topology(options.topology) if options.topology else (None, chips.local_devices())
    )
    shape = (
        shape_of(chosen.model)
        if chosen.model or not options.config
        else new_network(options.config)
    )
    report = compiled.compile_plan(chosen, shape, devices)
    print(report_text(chosen, shape, chip, report))
    if report.refused or (chip and not fits(chip, report)):
        raise SystemExit(2)


def new_network(path: Path) -> ModelConfig:
    """The shape of the network that a task's settings make anew. Raises UserError where
    its size hangs on the data.
    """

    if read_config(RunConfig, path).model_kind == "classifier":
        raise UserError("a text classifier is no policy: there is nothing to plan")
    settings = read_config(tasks.TaskConfig, path)
    if settings.task == "speech":
        raise UserError(
            "a network that hears is as large as its recordings: plan the config.json of the run's policy folder"
        )
    return tasks.new_network(settings)
