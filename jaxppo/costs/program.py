"""The collectives of a compiled program: their bytes, and how often a step runs them.

Phases and loops have the names of the step's `jax.named_scope`s: generate, decode,
reference, update, epochs, minibatches, microbatches, layers, chunks.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from jaxppo.costs import hlo
from jaxppo.costs.chips import Chip
from jaxppo.costs.hlo import Computation, Instruction, Loop

# Bytes of a number; of types that are not here, 4.
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f64": 8, "s64": 8, "u64": 8}
BYTES |= dict.fromkeys(("bf16", "f16", "s16", "u16"), 2)

PHASES = ("generate", "reference", "update")
CALLS = "calls|to_apply|true_computation|false_computation|branch_computations|called_computations"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str
    arrays: tuple[hlo.Array, ...]  # the result on each device
    group: int  # devices that exchange with each other
    loops: tuple[Loop, ...]  # around it, the outermost first
    phase: str  # one of PHASES, or ""

    @property
    def size(self) -> int:
        """Bytes of the result on a device."""
        return sum(BYTES.get(dtype, 4) * math.prod(dims) for dtype, dims in self.arrays)

    @property
    def sent(self) -> float:
        """A lower bound of the bytes that a device sends (Patarasuk and Yuan 2009,
        doi:10.1016/j.jpdc.2008.09.002).
        """
        if self.kind == "collective-permute":
            return self.size
        if self.kind == "reduce-scatter":  # the result is one part of the sum
            return self.size * (self.group - 1)
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.size * (self.group - 1) / self.group

    @property
    def times(self) -> int:
        """How often a step runs it at most; a loop of unknown length counts once."""
        return math.prod(loop.times or 1 for loop in self.loops)

    @property
    def decoding(self) -> bool:
        """Whether it runs once for each generated token."""
        return any(loop.name == "decode" for loop in self.loops)


def collectives(
    text: str, devices: int, trips: Mapping[str, int] | None = None
) -> dict[Collective, int]:
    """The collectives of a program for this many devices, and how many of each there
    are. `trips` is how often loops of these names run at most (`hlo.loop_of`).

    >>> line = "  %x = f32[4,8]{1,0} all-gather(%y), replica_groups={{0,1},{2,3}}"
    >>> text = f"ENTRY %main (y: f32[8]) -> f32[4,8] {{\\n{line}\\n}}"
    >>> [(x.kind, x.size, x.group, n) for x, n in collectives(text, 4).items()]
    [('all-gather', 128, 2, 1)]
    """
    program = hlo.parse(text)
    found: dict[str | int, Collective] = {}

    def visit(where: str, around: tuple[Loop, ...], phase: str) -> None:
        for x in program.get(where, {}).values():
            own = phase_of(x.scope) or phase
            if x.opcode == "while":
                taken = {own, *(loop.name for loop in around)}
                inside = (*around, hlo.loop_of(program, x, taken, trips or {}))
                for callee in x.called("condition|body"):
                    visit(callee, inside, own)
            elif (one := collective(x, program[where], devices, around, own)) is not None:
                channel = re.search(r"channel_id=(\d+)", x.tail)
                key = channel[1] if channel else len(found)
                # A collective that overlaps with products, or with a whole loop,
                # is written there as well: the outermost place counts.
                if key not in found or len(around) < len(found[key].loops):
                    found[key] = one
            elif not x.opcode.endswith(("-done", "-update")):  # their start is visited
                for callee in x.called(CALLS):
                    visit(callee, around, own)

    visit(hlo.entry(text), (), "")
    return dict(Counter(found.values()))


def collective(
    x: Instruction, computation: Computation, devices: int, around: tuple[Loop, ...], phase: str
) -> Collective | None:
    """The collective that an instruction runs or starts; None for all others."""
    kind = x.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    arrays = hlo.arrays(x.shape)
    if x.opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, the hardware's counters)
        arrays = tuple(one for one in arrays if one != ("u32", ()))
        arrays = arrays[len(arrays) // 2 :]
    if kind == "all-reduce" and "all-reduce-scatter" in x.computation:
        # fused with the slice that each device keeps
        kind = "reduce-scatter"
        arrays = hlo.arrays(next(reversed(computation.values())).shape)
    return Collective(kind, arrays, group_size(x.tail, devices), around, phase)


def group_size(text: str, devices: int) -> int:
    """How many devices exchange with each other: from `replica_groups` in any notation,
    or all.

    >>> [
    ...     group_size(f"replica_groups={x}, dimensions", 8)
    ...     for x in ("{{0,1},{2,3}}", "[2,4]<=[8]", "{}")
    ... ]
    [2, 4, 8]
    >>> group_size("replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}, use", 8)
    4
    >>> group_size("replica_groups=mesh['a'=8] {'a':(2)4}, use", 8)  # a part of an axis
    4
    """
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return groups[1].count(",") + 1
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(groups[1])
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        return math.prod(
            int(part or sizes[name])
            for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[2])
        )
    return devices


def phase_of(scope: str) -> str:
    """The phase in an operation's name, or "".

    >>> phase_of("jit(f)/generate/decode/while"), phase_of("jit(f)/reduce_sum")
    ('generate', '')
    """
    return next((name for name in hlo.names(scope) if name in PHASES), "")


def phases_in(text: str) -> tuple[str, ...]:
    """The phases that a program has."""
    scopes = set(re.findall(r'op_name="([^"]*)"', text))
    return tuple(name for name in PHASES if any(phase_of(scope) == name for scope in scopes))


def rematerialisations(messages: str) -> list[str]:
    """The operations for which the compiler gathers a whole tensor to shard it in
    another way, from its warnings.

    >>> warning = "W12 x.cc:654] [SPMD] Involuntary full rematerialization. "
    >>> rematerialisations(warning + 'metadata={op_name="jit(f)/sin" id=3}')
    ['jit(f)/sin']
    """
    lines = [x for x in messages.splitlines() if "nvoluntary full rematerialization" in x]
    named = [re.search(r'op_name="([^"]*)"', line) for line in lines]
    return [found[1] if found else "an operation without a name" for found in named]


def time_bounds(
    chip: Chip, phases: dict[str, tuple[float, float]], collectives: dict[Collective, int]
) -> dict[str, dict[str, float]]:
    """For each phase, lower bounds of the seconds of computation, memory and links, at
    the chip's published peaks (of computation in bfloat16, for any --dtype).
    """
    sent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for x, number in collectives.items():
        if x.phase:
            sent[x.phase] += x.sent * x.times * number
    return {
        name: {
            "compute": flops / chip.flops,
            "memory": moved / chip.bandwidth,
            "links": sent[name] / chip.links,
        }
        for name, (flops, moved) in phases.items()
    }
