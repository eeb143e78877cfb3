"""Judges of the answer in a response, by the protocols of public runs, on the host.

Nothing in a response is executed: an arithmetic expression is parsed, and its tree may
have + - * / and integers alone.
"""

import ast
import operator
import re
from difflib import SequenceMatcher
from fractions import Fraction

from jaxppo.errors import UserError

LONGEST = 200  # characters of an expression
PUZZLE = r"(\d+(?: \d+)*) -> (-?\d+)"  # numbers, target
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
BAD = (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError)


def tagged(text: str, tag: str) -> list[str]:
    """Return what stands between <tag> and </tag>, stripped.

    >>> tagged("I think <a> 1 </a> or <a>2</a> <a>3", "a")
    ['1', '2']
    """
    return [x.strip() for x in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)]


def last_answer(text: str) -> str:
    """Return what stands in the last <answer> tags, or ""."""
    return ["", *tagged(text, "answer")][-1]


def reversed_text(response: str, reference: str) -> float:
    """Return difflib's ratio of the first text in <reversed_text> tags to the
    reference. Without tags the text is empty.

    The reward of prime-rl's reverse-text
    (https://github.com/PrimeIntellect-ai/verifiers, environments/reverse_text).

    >>> reversed_text("<reversed_text>tac</reversed_text>", "tac")
    1.0
    """
    found = [*tagged(response, "reversed_text"), ""][0]
    return SequenceMatcher(None, found, reference).ratio()


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """Return the exact value of an expression and the integers in it. None if it has
    anything but integers, + - * / and parentheses, divides by 0, or is long.

    >>> evaluate("(1 + 2) / 6")
    (Fraction(1, 2), [1, 2, 6])
    >>> evaluate("2 ** 3") is None
    True
    """
    if len(expression) > LONGEST or not re.fullmatch(r"[0-9+*/() -]+", expression):
        return None
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(x)):
                numbers.append(x)
                return Fraction(x)
            case ast.UnaryOp(op=ast.USub(), operand=x):
                return -value(x)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise ValueError(type(node).__name__)

    try:
        return value(ast.parse(expression.strip(), mode="eval").body), numbers
    except BAD:
        return None


def countdown_puzzle(reference: str) -> str:
    """Return the puzzle that a solution in <answer> tags solves; a puzzle stays. Raises
    UserError for neither.

    >>> countdown_puzzle("7*3=21 21+5=26 <answer>7*3+5</answer>")
    '3 5 7 -> 26'
    """
    if re.fullmatch(PUZZLE, reference.strip()):
        return reference.strip()
    solved = evaluate(last_answer(reference))
    if solved is None or solved[0].denominator > 1:
        raise UserError(
            f'the reference {reference[:60]!r} is no puzzle, such as "3 5 7 -> 26", and has no '
            "solution in <answer> tags"
        )
    return f"{' '.join(map(str, sorted(solved[1])))} -> {solved[0]}"


def countdown_result(response: str, puzzle: str) -> float:
    """Return 1 if the last expression in <answer> tags reaches the puzzle's target with
    each number exactly once, else 0.

    The rule of TinyZero (https://github.com/Jiayi-Pan/TinyZero,
    verl/utils/reward_score/countdown.py), which reads the last line alone, in exact
    arithmetic, and without the powers, whole divisions and decimals that it lets
    through.

    >>> countdown_result("<answer>5 + 3*7</answer>", "3 5 7 -> 26")
    1.0
    """
    given = re.fullmatch(PUZZLE, puzzle)
    if given is None:
        raise ValueError(f"no puzzle: {puzzle!r}")
    found = evaluate(last_answer(response))
    numbers = sorted(map(int, given[1].split()))
    return float(found is not None and found[0] == int(given[2]) and sorted(found[1]) == numbers)


def countdown_format(response: str, puzzle: str) -> float:
    """Return 1 if the response has an answer in <answer> tags, else 0."""
    return float(bool(tagged(response, "answer")))


def countdown(response: str, puzzle: str) -> dict[str, float]:
    """Return `countdown_format` and `countdown_result` by name."""
    return {
        "format": countdown_format(response, puzzle),
        "result": countdown_result(response, puzzle),
    }


def gsm8k_number(reference: str) -> str:
    """Return the number after "#### " in a worked solution, without commas. Raises
    UserError without one.

    >>> gsm8k_number("24 + 18 = <<24+18=42>>42\\n#### 1,042")
    '1042'
    """
    found = re.search(r"#### (-?[0-9.,]+)", reference)
    if found is None:
        raise UserError(f'the reference {reference[-60:]!r} does not end with "#### number"')
    return found[1].replace(",", "")


def gsm8k(response: str, number: str, *, flexible: bool = False) -> float:
    """Return 1 if the final number of a response is `number`, else 0.

    The rule of verl (https://github.com/volcengine/verl,
    verl/utils/reward_score/gsm8k.py): the number is read in the last 300 characters,
    after the last "#### " (strict), or is the last number of all (flexible), and is
    compared as text. Strict drops commas, flexible does not.

    >>> gsm8k("so #### 1,000", "1000"), gsm8k("so 7", "7", flexible=True)
    (1.0, 1.0)
    """
    end = response[-300:]
    if flexible:
        found = [x for x in re.findall(r"-?[0-9.,]+", end) if x != "."]
    else:
        found = [x.replace(",", "") for x in re.findall(r"#### (-?[0-9.,]+)", end)]
    return float(bool(found) and found[-1] == number)
