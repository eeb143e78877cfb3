"""Read the text of a compiled program: computations, instructions, loops.

The text is XLA's, of `compiled.as_text()`
(https://openxla.org/xla/operation_semantics).
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")

# Scopes that JAX adds by itself.
SILENT = {"body", "checkpoint", "closed_call", "cond", "rematted_computation", "while"}

Array = tuple[str, tuple[int, ...]]  # type and dimensions


class Loop(NamedTuple):
    """A loop of a program."""

    name: str  # of the innermost `jax.named_scope` around it
    times: int | None  # how often its body runs; None if unknown
    exact: bool  # False: at most so often


class Instruction(NamedTuple):
    """A line of the text."""

    name: str
    computation: str  # its name
    shape: str
    opcode: str
    tail: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """Names of the operands; the value of a constant."""
        inside = re.split(r"\)(?:,|$)", self.tail)[0]  # shapes have parentheses, too
        return re.findall(r"%([\w.\-]+)", inside) or [inside]

    @property
    def scope(self) -> str:
        """The names that JAX gave: of the scopes, then of the operation."""
        found = re.search(r'op_name="([^"]*)"', self.tail)
        return found[1] if found else ""

    def called(self, attribute: str) -> list[str]:
        """The computations that it calls under one of these attributes."""
        found = re.findall(rf"\b(?:{attribute})=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.tail)
        return [name.strip(" %") for one, several in found for name in (one or several).split(",")]


Computation = dict[str, Instruction]
Program = dict[str, Computation]


def parse(text: str) -> Program:
    """The computations of a program; the last instruction of each is its root."""
    program: Program = {}
    inside = ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            inside = header[2]
            program[inside] = {}
        elif line.startswith("}"):
            inside = ""
        elif inside and (x := INSTRUCTION.match(line)):
            program[inside][x[1]] = Instruction(x[1], inside, x[2], x[3], x[4])
    return program


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, or of a tuple of them.

    >>> arrays("(f32[2,3]{1,0:T(8,128)}, pred[])")
    (('f32', (2, 3)), ('pred', ()))
    """
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return tuple((dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found)


def entry(text: str) -> str:
    """The name of the computation with which a program starts."""
    found = re.search(r"^ENTRY %?([\w.\-]+) \(", text, re.MULTILINE)
    return found[1] if found else ""


def names(scope: str) -> list[str]:
    """The scopes in an operation's name, without those of JAX itself.

    >>> names("jit(f)/update/epochs/while/body/transpose(jvp(minibatches))/while")
    ['update', 'epochs', 'minibatches']
    """
    parts = [part for part in scope.split("/") if not part.startswith("jit(")]
    bare = [re.sub(r"^(?:\w+\()*|\)*$", "", part) for part in parts]
    return [name for name in bare if name and name not in SILENT]


def loop_of(program: Program, x: Instruction, around: set[str], trips: Mapping[str, int]) -> Loop:
    """The loop of a `while` instruction.

    Args:
      around: names of the loops and phases around it. A loop without a name of its own
        has that of a scope around it, and is called "loop".
      trips: from a name to how often such a loop runs at most. It is used if neither
        XLA nor the loop's counter says how often it runs.
    """
    scopes = names(x.scope)
    name = scopes[-1] if scopes and scopes[-1] not in around else "loop"
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.tail)
    times = int(known[1]) if known else count_trips(program, x)
    return Loop(name, trips.get(name), False) if times is None else Loop(name, times, True)


def count_trips(program: Program, x: Instruction) -> int | None:
    """How often a loop `for (i = start; i < limit; i += step)` of constants runs. Scans
    and XLA's own loops are such; None for any other loop.
    """
    condition, body = (program[x.called(part)[0]] for part in ("condition", "body"))
    compare, following = next(reversed(condition.values())), next(reversed(body.values()))
    begin = program[x.computation].get(x.operands[0])
    if compare.opcode != "compare" or "direction=LT" not in compare.tail:
        return None
    counter, limit = compare.operands
    place = re.search(r"index=(\d+)", condition[counter].tail)
    if place is None or begin is None or not begin.opcode == following.opcode == "tuple":
        return None
    first, next_ = (one.operands[int(place[1])] for one in (begin, following))
    if next_ not in body or body[next_].opcode != "add":
        return None
    start, end = constant(program[x.computation], first), constant(condition, limit)
    steps = [constant(body, name) for name in body[next_].operands]
    step = steps[0] or steps[1]
    if start is None or end is None or not step:
        return None
    return max(-(-(end - start) // step), 0)


def constant(computation: Computation, name: str) -> int | None:
    """The value of an integer constant, perhaps copied; None for anything else."""
    x = computation.get(name)
    while x is not None and x.opcode in ("bitcast", "convert", "copy", "reshape"):
        x = computation.get(x.operands[0])
    known = x is not None and x.opcode == "constant" and re.fullmatch(r"-?\d+", x.operands[0])
    return int(x.operands[0]) if x is not None and known else None
