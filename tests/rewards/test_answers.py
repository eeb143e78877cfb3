"""Scorers of the recipes: right, wrong, malformed and hostile answers."""

from fractions import Fraction

import pytest

from jaxppo.errors import UserError
from jaxppo.rewards import answers

PUZZLE = "3 5 7 -> 26"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<reversed_text>.em ees</reversed_text>", 1.0),
        ("so: <reversed_text>\n.em ees </reversed_text>!", 1.0),  # spaces inside the tags
        ("<reversed_text>.em</reversed_text>", 2 * 3 / (3 + 7)),  # twice what is common, of both
        ("<reversed_text>see me.</reversed_text>", 2 * 2 / 14),  # "ee" alone, in order
        ("<reversed_text></reversed_text>", 0.0),
        (".em ees", 0.0),  # no tags
        ("<reversed_text>.em ees", 0.0),  # not closed
        ("<reversed_text>x</reversed_text><reversed_text>.em ees</reversed_text>", 0.0),
    ],
)
def test_reversed_text(response, expected):
    assert answers.reversed_text(response, ".em ees") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("1", (1, [1])),
        (" 2*(5 + 13)+3 ", (39, [2, 5, 13, 3])),
        ("7 / 2", (Fraction(7, 2), [7, 2])),
        ("1/3*3", (1, [1, 3, 3])),  # exact
        ("-1 + (20 - 8)/1", (11, [1, 20, 8, 1])),
        ("2--3", (5, [2, 3])),
    ],
)
def test_an_expression_has_an_exact_value(expression, expected):
    assert answers.evaluate(expression) == expected


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "  ",
        "1/0",
        "1/(2-2)",
        "1 +",
        "(1",
        "1)",
        "1 2",
        "1(2)",  # a call
        "(1)(2)",
        "()",
        "2**3",
        "7//2",
        "1,2",
        "1.5",
        "1e9",
        "0x10",
        "1_0",
        "01",
        "1 = 1",
        "1 if 1 else 2",
        "+1",
        "x",
        "True",
        "٣",  # a digit of another script
        "1\n+2",
        "1;2",
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "[1][0]",
        "9" * 201,
        "(" * 100 + "1" + ")" * 100,
        "-" * 199 + "1" + " ",
    ],
)
def test_anything_else_has_none(expression):
    found = answers.evaluate(expression)
    assert found is None or expression.strip("- ") == "1"  # a chain of signs is arithmetic


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<answer>3*7+5</answer>", (1, 1)),
        ("7*3=21 21+5=26 <answer> (7 * 3) + 5 </answer>", (1, 1)),
        ("<answer>9</answer> no: <answer>5+7*3</answer>", (1, 1)),  # the last one counts
        ("<answer>5+7*3</answer> no: <answer>9</answer>", (1, 0)),
        ("<answer>3+5+7</answer>", (1, 0)),  # 15
        ("<answer>26</answer>", (1, 0)),  # another number
        ("<answer>3*7+5+0</answer>", (1, 0)),
        ("<answer>3*7+5*1</answer>", (1, 0)),
        ("<answer>21+5</answer>", (1, 0)),
        ("<answer>3*7+5=26</answer>", (1, 0)),
        ("<answer>7*3+5/5*5</answer>", (1, 0)),  # a number too often
        ("<answer></answer>", (1, 0)),
        ("<answer>print(26)</answer>", (1, 0)),
        ("<answer>3*7+5", (0, 0)),
        ("3*7+5", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_countdown(response, expected):
    assert answers.countdown(response, PUZZLE) == dict(
        zip(("format", "result"), expected, strict=True)
    )


def test_each_number_as_often_as_it_is_given():
    assert answers.countdown_result("<answer>4*1*1</answer>", "1 1 4 -> 4") == 1
    assert answers.countdown_result("<answer>4*1</answer>", "1 1 4 -> 4") == 0
    with pytest.raises(ValueError, match="no puzzle: '4'"):
        answers.countdown_result("<answer>4</answer>", "4")


def test_a_solution_is_its_puzzle():
    assert answers.countdown_puzzle("<answer>9-1</answer> <answer>10-16+13</answer>") == (
        "10 13 16 -> 7"
    )
    assert answers.countdown_puzzle(" 3 5 7 -> 26\n") == PUZZLE
    for reference in ("26", "<answer>1/2</answer>", "<answer>x</answer>", "3 5 -> ", ""):
        with pytest.raises(UserError, match="no puzzle, such as"):
            answers.countdown_puzzle(reference)


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        ("18 + 24 = 42\n#### 42", 1, 1),
        ("#### 42.", 0, 0),  # compared as text
        ("#### 42.0", 0, 0),
        ("#### 42 dollars", 1, 1),
        ("#### $42", 0, 1),
        ("####42", 0, 1),
        ("#### 7 no, #### 42", 1, 1),  # the last
        ("#### 42 no, #### 7", 0, 0),
        ("#### 42, of 50", 1, 0),
        ("The answer is 42", 0, 1),
        ("The answer is 42 . ", 0, 1),  # a dot is no number
        ("#### forty-two", 0, 0),
        ("", 0, 0),
        ("#### 42" + " " * 300, 0, 0),  # not among the last 300 characters
        ("x" * 1000 + "#### 42", 1, 1),
    ],
)
def test_gsm8k_is_verls(response, strict, flexible):
    assert answers.gsm8k(response, "42") == strict
    assert answers.gsm8k(response, "42", flexible=True) == flexible


def test_commas():
    number = answers.gsm8k_number("so 1,200 - 0 = <<1200-0=1200>>1,200\n#### 1,200")
    assert number == "1200" and answers.gsm8k_number("#### -3") == "-3"
    assert answers.gsm8k("#### 1,200", number) == 1
    assert answers.gsm8k("#### 1,200", number, flexible=True) == 0  # verl's does not drop them
    with pytest.raises(UserError, match="does not end with"):
        answers.gsm8k_number("42")
