"""Answer an arithmetic question, with or without a calculator.

A question is "123*4567=". A turn that begins with "=", as "=123*4567", calls the
calculator, and the answer is its result; "?" if it cannot be read: two integers of one
to five digits without a sign, and one of + - * between them. Any other turn is the
policy's answer to the question and ends the episode, with the reward 1 if it is right,
digit by digit, and else 0. A call in the last turn has the reward 0.

The best return is 1. Without the calculator (`tool=False`) every call is answered with
"?", and the rest is the same.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxppo.environments import strings
from jaxppo.environments.text import Answer, Game, TextEnvironment, from_rows

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
DIGITS = 5  # most digits of an operand
LONGEST = len(f"{99999 * 99999}\n")


def read_call(text: strings.String) -> tuple[Array, Array, Array, Array]:
    """(a, b, the number of the operation, whether it is readable) of a text "=a*b"."""
    place = jnp.arange(len(text.bytes), dtype=jnp.int32)
    signs = jnp.array([ord(sign) for sign in OPERATIONS], jnp.uint8)
    is_sign = jnp.isin(text.bytes, signs) & (place < text.length)
    where = jnp.where(is_sign.any(), jnp.argmax(is_sign), 0)
    left, right = strings.cut(text, 1, where), strings.cut(text, where + 1, text.length)
    (a, _), (b, _) = strings.parse_integer(left), strings.parse_integer(right)
    plain = lambda part: (
        (part.length >= 1)
        & (part.length <= DIGITS)
        & (strings.is_digit(part.bytes) | (place >= part.length)).all()
    )
    operation = jnp.argmax(text.bytes[where] == signs)
    return a, b, operation, (text.bytes[0] == ord("=")) & plain(left) & plain(right)


def multiply(a: Int[Array, ""], b: Int[Array, ""]) -> strings.String:
    """The product of two integers of 0 to 99,999 as text: it may exceed int32.

    With b = 1000 c + d and q = ac, a·b = (q div 100)·10⁵ + (q mod 100)·1000 + ad, which
    is written as two parts of five digits.
    """
    q, p = a * (b // 1000), a * (b % 1000)  # below 10⁷ and 10⁸
    low = q % 100 * 1000 + p % 10**5
    high = q // 100 + p // 10**5 + low // 10**5
    long = strings.join(
        [
            strings.write_integer(high, digits=5),
            strings.write_integer(low % 10**5, digits=5, fill=True),
        ],
        LONGEST,
    )
    short = strings.join([strings.write_integer(low % 10**5, digits=5)], LONGEST)
    return jax.tree.map(lambda x, y: jnp.where(high > 0, x, y), long, short)


def calculate(text: strings.String) -> tuple[strings.String, Bool[Array, ""]]:
    """(the result of a call as text, whether it can be read)."""
    a, b, operation, readable = read_call(text)
    total = strings.write_integer(jnp.where(operation == 0, a + b, a - b))
    results = [multiply(a, b), strings.join([total], LONGEST)]
    return jax.tree.map(lambda x, y: jnp.where(operation == 2, x, y), *results), readable


def make_environment(turns: int, tool: bool) -> TextEnvironment:
    """The game on instances {"answer": UInt8[B 11], "answer_length": Int[B]}."""

    def step(state: dict[str, Array], text: strings.String, key: Array, turn: Array):
        line = strings.first_line(text)
        result, readable = calculate(line)
        called = (line.length > 0) & (line.bytes[0] == ord("="))
        shown, unknown = strings.join([result, "\n"], LONGEST), strings.string("?\n", LONGEST)
        good = readable & tool
        reply = jax.tree.map(lambda x, y: jnp.where(good, x, y), shown, unknown)
        width = len(state["answer"])
        given = jnp.pad(line.bytes, (0, width))[:width]
        same = (given == state["answer"]).all() & (line.length == state["answer_length"])
        reply = reply._replace(length=jnp.where(called, reply.length, 0))
        return state, Answer(reply, (same & ~called).astype(jnp.float32), ~called)

    return from_rows(
        lambda instance: {name: instance[name] for name in ("answer", "answer_length")},
        step,
        max_turns=turns,
        turn_length=len("=99999*99999\n"),
        reply_length=LONGEST,
        alphabet=b"0123456789-?\n",
    )


def make_instance(rng: np.random.Generator, digits: Sequence[int], operations: str) -> dict:
    """A question whose operands have `digits[0]` to `digits[1]` digits."""
    sizes = rng.integers(digits[0], digits[1], 2, endpoint=True)
    a, b = (int(rng.integers(10 ** (n - 1) if n > 1 else 0, 10**n)) for n in sizes)
    sign = operations[rng.integers(len(operations))]
    answer = str(OPERATIONS[sign](a, b)).encode()  # Python's integers: of any size
    table = np.zeros(LONGEST - 1, np.uint8)
    table[: len(answer)] = list(answer)
    question = f"{a}{sign}{b}"
    return {"prompt": f"{question}=", "answer": table, "answer_length": np.int32(len(answer))}


def make(
    digits: tuple[int, int] = (3, 5), operations: str = "+-*", turns: int = 2, tool: bool = True
) -> Game:
    """The game with operands of so many digits (least, most).

    The script calls the calculator and copies its result; the optimum is 1 with the
    calculator and, for who can calculate, without it.
    """

    def instances(number: int, seed: int) -> list[dict[str, Any]]:
        rng = np.random.default_rng(seed)
        return [make_instance(rng, digits, operations) for _ in range(number)]

    def script(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        if replies and replies[-1] != "?\n":
            return replies[-1]
        call = f"={instance['prompt'].removesuffix('=')}\n"
        return call if tool else bytes(instance["answer"]).decode().rstrip("\0") + "\n"

    def random(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        """Calls the calculator or not, and answers with its result or any digits."""
        if rng.random() < 0.5 and (replies or turns > 1):
            return replies[-1] if replies else f"={instance['prompt'].removesuffix('=')}\n"
        return f"{rng.integers(10 ** rng.integers(1, 2 * digits[1]))}\n"

    return Game(make_environment(turns, tool), instances, script, random, 1.0)
