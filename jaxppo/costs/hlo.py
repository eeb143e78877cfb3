"""The loops of a compiled program's text: what they are called, and how often they go
round.

XLA does not always write a loop's trip count down. It follows from the counter: where
it starts, how far it steps, and the number that the condition compares it with.
"""

import re
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")

SAME = (
    "bitcast",
    "convert",
    "copy",
    "copy-done",
    "copy-start",
    "reshape",
)  # a number is the same behind them

SILENT = {
    "body",
    "checkpoint",
    "closed_call",
    "cond",
    "rematted_computation",
    "while",
}  # names that JAX puts in by itself

Array = tuple[str, tuple[int, ...]]  # type and dimensions


class Loop(NamedTuple):
    """One loop of a program."""

    name: str  # of the innermost `jax.named_scope` around it
    times: int | None  # how often its body runs; None where the text does not tell
    exact: bool  # False: so often at most


class Instruction(NamedTuple):
    """One line of the text."""

    name: str
    place: str  # name of its computation
    shape: str
    opcode: str
    tail: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """Names of the operands; of a constant or a parameter, its number."""
        depth, end = 1, 0
        while depth and end < len(self.tail):
            depth += {"(": 1, ")": -1}.get(self.tail[end], 0)
            end += 1
        inside = self.tail[: end - 1]
        return re.findall(r"%([\w.\-]+)", inside) or [inside]

    @property
    def index(self) -> int:
        """Which element of its tuple a get-tuple-element takes."""
        found = re.search(r"index=(\d+)", self.tail)
        assert found
        return int(found[1])

    @property
    def scope(self) -> str:
        """The names that JAX gave: of the scopes around it, and of the operation."""
        found = re.search(r'op_name="([^"]*)"', self.tail)
        return found[1] if found else ""

    def called(self, attribute: str) -> list[str]:
        """The computations that it calls under one of these attributes."""
        found = re.findall(rf"\b(?:{attribute})=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.tail)
        return [name.strip(" %") for one, several in found for name in (one or several).split(",")]


Computation = dict[str, Instruction]
Program = dict[str, Computation]
# (element of a loop's state or None, number): the sum of both
Linear = tuple[int | None, int]


def parse(text: str) -> Program:
    """The computations of a program, each with its instructions in order; the root is
    the last.
    """
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
    """Name of the computation that a program starts with."""
    found = re.search(r"^ENTRY %?([\w.\-]+) \(", text, re.MULTILINE)
    return found[1] if found else ""


def names(scope: str) -> list[str]:
    """The names of a scope that somebody gave, without transformations.

    >>> names("jit(f)/update/epochs/while/body/transpose(jvp(minibatches))/while")
    ['update', 'epochs', 'minibatches']
    """
    parts = [part for part in scope.split("/") if not part.startswith("jit(")]
    bare = [re.sub(r"^(?:\w+\()*|\)*$", "", part) for part in parts]
    return [name for name in bare if name and name not in SILENT]


def loop_of(program: Program, where: str, x: Instruction, around: set[str]) -> Loop:
    """The loop that a `while` is; nameless ones inside a loop that has taken the
    scope's name are called "loop".
    """
    given = names(x.scope)
    name = given[-1] if given and given[-1] not in around else "loop"
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', x.tail):
        return Loop(name, int(known[1]), True)
    times, exact = trips(program, where, x)
    return Loop(name, times, exact)


def trips(program: Program, where: str, x: Instruction) -> tuple[int | None, bool]:
    """(how often a `while` goes round, whether it is just as often), from its counter;
    (None, False) if it has none.
    """
    (condition,), (body,) = x.called("condition"), x.called("body")
    found = bound(program, condition, root(program, condition), ())
    if found is None:
        return None, False
    (element, offset), (limit_element, limit), alone = found
    carried = 0 if limit_element is None else initial(program, where, x, limit_element)
    if element is None or carried is None:
        return None, False
    start = initial(program, where, x, element)
    step = linear(program, body, part(program, body, root(program, body), element), ())
    # A counter whose start cannot be seen is taken to start at 0, and to step by 1: so
    # often at most.
    known = start is not None and step is not None and step[0] == element and step[1] > 0
    stride = step[1] if known and step is not None else 1
    return max(-(-(limit + carried - offset - (start or 0)) // stride), 0), alone and known


def root(program: Program, where: str) -> str:
    return next(reversed(program[where]))


def part(program: Program, where: str, name: str, index: int) -> str:
    """Which instruction is this element of a tuple; "" if that cannot be seen."""
    x = program[where].get(name)
    if x is None or x.opcode != "tuple" or index >= len(x.operands):
        return ""
    return x.operands[index]


def initial(program: Program, where: str, x: Instruction, element: int) -> int | None:
    """The number that an element of a loop's state starts with, if that can be seen."""
    where, name = argument(program, where, x.operands[0])
    found = linear(program, where, part(program, where, name, element), ())
    return found[1] if found is not None and found[0] is None else None


def argument(program: Program, where: str, name: str) -> tuple[str, str]:
    """(computation, instruction) of what is passed for a parameter of a computation
    that is called: XLA:CPU calls small loops.
    """
    x = program[where].get(name)
    if x is not None and x.opcode == "parameter":
        for place, body in program.items():
            for call in body.values():
                if call.opcode == "call" and call.called("to_apply") == [where]:
                    return place, call.operands[int(x.operands[0])]
    return where, name


def linear(program: Program, where: str, name: str, given: tuple) -> Linear | None:
    """What an integer is: an element of the loop's state plus a number. `given` are the
    arguments inside a fusion.
    """
    x = program[where].get(name)
    if x is None:
        return None
    if x.opcode == "constant":
        return (None, int(x.operands[0])) if re.fullmatch(r"-?\d+", x.operands[0]) else None
    if x.opcode == "parameter":
        number = int(x.operands[0])
        return given[number] if number < len(given) else None
    if x.opcode == "get-tuple-element":
        source = program[where].get(x.operands[0])
        return (
            (x.index, 0)
            if source is not None and source.opcode == "parameter" and not given
            else None
        )
    if x.opcode in SAME:
        return linear(program, where, x.operands[0], given)
    inside = [linear(program, where, operand, given) for operand in x.operands]
    if x.opcode == "fusion":
        (callee,) = x.called("calls")
        return linear(program, callee, root(program, callee), tuple(inside))
    if x.opcode == "add":
        one, other = inside
        if one is not None and other is not None and None in (one[0], other[0]):
            return one[0] if other[0] is None else other[0], one[1] + other[1]
    return None


def bound(
    program: Program, where: str, name: str, given: tuple
) -> tuple[Linear, Linear, bool] | None:
    """(the counter, what it stays below, whether nothing else ends the loop) of a
    condition; None if it is none of a counter.
    """
    x = program[where][name]
    if x.opcode in SAME and x.operands[0] in program[where]:
        return bound(program, where, x.operands[0], given)
    inside = tuple(linear(program, where, operand, given) for operand in x.operands)
    if x.opcode == "compare":
        way = re.search(r"direction=(\w+)", x.tail)
        counter, limit = (
            inside
            if way and way[1] == "LT"
            else inside[::-1]
            if way and way[1] == "GT"
            else (None, None)
        )
        return None if counter is None or limit is None else (counter, limit, True)
    if x.opcode == "fusion":
        (callee,) = x.called("calls")
        return bound(program, callee, root(program, callee), inside)
    if x.opcode == "and":
        found = [
            bound(program, where, operand, given)
            for operand in x.operands
            if operand in program[where]
        ]
        first = next((one for one in found if one is not None), None)
        return None if first is None else (first[0], first[1], False)
    return None
