"""A compiled program's text taken apart: its collectives, the loops that they stand in,
and how often a step runs them.

The text is XLA's, of `compiled.as_text()`
(https://openxla.org/xla/operation_semantics). Loops and phases get their names from the
`jax.named_scope`s of the step: generate, decode, reference, update, epochs,
minibatches, microbatches.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

from jaxppo.costs import hlo
from jaxppo.costs.chips import Chip
from jaxppo.costs.hlo import Computation, Instruction, Loop

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}  # others: 4

PHASES = ("generate", "reference", "update")
CALLS = "calls|to_apply|true_computation|false_computation|branch_computations|called_computations"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One exchange between devices."""

    kind: str
    # type and dimensions of what each device has after it
    arrays: tuple[hlo.Array, ...]
    group: int  # devices that take part together
    loops: tuple[Loop, ...]  # around it, the outermost first
    phase: str  # one of PHASES, or "" between them

    @property
    def size(self) -> int:
        """Bytes of the result on a device."""
        return sum(BYTES.get(dtype, 4) * math.prod(dims) for dtype, dims in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that a device sends at least, with any algorithm (Patarasuk and Yuan
        2009, doi:10.1016/j.jpdc.2008.09.002).
        """
        part = (self.group - 1) / self.group
        if self.kind == "collective-permute":
            return self.size
        if self.kind == "reduce-scatter":  # the result is one part of what was summed
            return self.size * (self.group - 1)
        return self.size * part * (2 if self.kind == "all-reduce" else 1)

    @property
    def times(self) -> int:
        """How often a step runs it, or may at most; a loop of unknown length counts
        once.
        """
        return math.prod(loop.times or 1 for loop in self.loops)

    @property
    def decoding(self) -> bool:
        """Whether it is run for every token that is generated."""
        return any(loop.name == "decode" for loop in self.loops)


def collectives(text: str, devices: int) -> dict[Collective, int]:
    """Every collective of a program for this many devices, and how many such stand
    there.

    >>> text = "ENTRY %main (y: f32[8]) -> f32[4,8] {\\n  %x = f32[4,8]{1,0} all-gather(%y), replica_groups={{0,1},{2,3}}\\n}"
    >>> [(x.kind, x.size, x.group, n) for x, n in collectives(text, 4).items()]
    [('all-gather', 128, 2, 1)]
    """
    program = hlo.parse(text)
    standing: dict[str | int, Collective] = {}

    def visit(where: str, around: tuple[Loop, ...], phase: str) -> None:
        for x in program.get(where, {}).values():
            own = phase_of(x.scope) or phase
            if x.opcode == "while":
                inside = (
                    *around,
                    hlo.loop_of(program, where, x, {own, *(loop.name for loop in around)}),
                )
                for callee in x.called("condition|body"):
                    visit(callee, inside, own)
            elif (one := collective(x, program[where], devices, around, own)) is not None:
                channel = re.search(r"channel_id=(\d+)", x.tail)
                key = channel[1] if channel else len(standing)
                # What is overlapped with products, or with a whole loop, stands in
                # each: its own place is the outermost.
                if key not in standing or len(around) < len(standing[key].loops):
                    standing[key] = one
            # of what was visited at its start
            elif not x.opcode.endswith(("-done", "-update")):
                for callee in x.called(CALLS):
                    visit(callee, around, own)

    visit(hlo.entry(text), (), "")
    return dict(Counter(standing.values()))


def collective(
    x: Instruction, computation: Computation, devices: int, around: tuple[Loop, ...], phase: str
) -> Collective | None:
    """The collective that an instruction is, or starts; None if it is none."""
    kind = x.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    arrays = hlo.arrays(x.shape)
    if (
        x.opcode.endswith("-start") and kind != "all-reduce"
    ):  # (operands, results, and what the hardware counts with)
        arrays = tuple(one for one in arrays if one != ("u32", ()))
        arrays = arrays[len(arrays) // 2 :]
    if (
        kind == "all-reduce" and "all-reduce-scatter" in x.place
    ):  # fused with the choice of each device's part
        kind = "reduce-scatter"
        arrays = hlo.arrays(next(reversed(computation.values())).shape)
    return Collective(kind, arrays, group_size(x.tail, devices), around, phase)


def group_size(text: str, devices: int) -> int:
    """How many devices exchange with each other, from `replica_groups` in any of its
    notations; all if there is none.

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
    """The phase that an operation's name tells, or "".

    >>> phase_of("jit(traced)/generate/decode/while"), phase_of("jit(traced)/reduce_sum")
    ('generate', '')
    """
    return next((name for name in hlo.names(scope) if name in PHASES), "")


def phases_in(text: str) -> tuple[str, ...]:
    """The phases of which a program has operations."""
    scopes = set(re.findall(r'op_name="([^"]*)"', text))
    return tuple(name for name in PHASES if any(phase_of(scope) == name for scope in scopes))


def involuntary(said: str) -> list[str]:
    """Operations that the compiler complained of: it gathers a whole tensor to cut it
    another way.

    >>> involuntary(
    ...     'W12 x.cc:654] [SPMD] Involuntary full rematerialization. ... metadata={op_name="jit(f)/sin" id=3}'
    ... )
    ['jit(f)/sin']
    """
    lines = [line for line in said.splitlines() if "nvoluntary full rematerialization" in line]
    return [
        named[1]
        if (named := re.search(r'op_name="([^"]*)"', line))
        else "an operation without a name"
        for line in lines
    ]


def bounds(
    chip: Chip, phases: dict[str, tuple[float, float]], collectives: dict[Collective, int]
) -> dict[str, dict[str, float]]:
    """For each phase the seconds that each of the chip's means needs at least, at its
    published peak; that of its operations is the one in bfloat16, whatever --dtype.
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
