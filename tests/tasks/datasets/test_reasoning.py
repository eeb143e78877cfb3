"""Puzzles: distinct, the same for the same seed, with answers that the package calls right."""

import sys

import pytest

from jaxppo.errors import UserError
from jaxppo.rewards import answers
from jaxppo.tasks.datasets import reasoning


@pytest.fixture(scope="module", params=["spell_backward", "chain_sum"])
def task(request) -> str:
    pytest.importorskip("reasoning_gym")
    return request.param


def answer(prompt: str) -> str:
    """Worked out from the prompt alone."""
    if prompt.startswith("Spell backward: "):
        return prompt.split()[-1][::-1]
    sums = prompt.removesuffix(" =").replace("- ", "-").replace("+ ", "").split()
    return str(sum(int(term) for term in sums))


def test_prompts_hold_the_question(task):
    parts = reasoning.load(task, 300)
    assert [len(part) for part in parts] == [240, 30, 30]
    rows = [row for part in parts for row in part]
    assert len({row.prompt for row in rows}) == 300
    checker = reasoning._dataset(task, size=1)
    for row in rows:
        assert row.reference == answer(row.prompt)
        entry = {"answer": row.reference, "metadata": row.extra["metadata"]}
        assert checker.score_answer(row.reference, entry) == 1
    assert max(len(row.prompt) for row in rows) < 70


def test_the_puzzles_are_the_same_each_time(task):
    first, again = (reasoning.load(task, 100) for _ in range(2))
    assert [row.prompt for part in first for row in part] == [x.prompt for y in again for x in y]


def test_worked_solutions_are_right():
    """The package draws other numbers with each seed; no puzzle is in two parts."""
    pytest.importorskip("reasoning_gym")
    parts = reasoning.load("countdown", 100)
    assert [len(part) for part in parts] == [80, 10, 10]
    rows = [row for part in parts for row in part]
    assert len({row.prompt for row in rows}) == 100
    for row in rows:
        assert answers.countdown_puzzle(row.reference) == row.prompt
        assert answers.countdown(row.reference, row.prompt) == {"format": 1, "result": 1}
        given, target = row.prompt.split(" -> ")
        assert target == row.extra["target"] and given.split() == [
            str(x) for x in sorted(row.extra["metadata"]["numbers"])
        ]
        for step in row.reference.split(" <")[0].split(", "):
            left, result = step.split(" = ")
            found = answers.evaluate(left)
            assert found is not None and str(found[0]) == result
    for row in reasoning.load("gsm_symbolic", 20).train:
        assert "final answer" not in row.prompt
        number = answers.gsm8k_number(row.reference)
        assert answers.gsm8k(row.reference, number) == 1


@pytest.mark.parametrize(
    ("expression", "steps"),
    [
        ("19 - 14 + 18", "19 - 14 = 5, 5 + 18 = 23 <answer> 19 - 14 + 18 </answer>"),
        ("-1 + (20 - 8)", "20 - 8 = 12, -1 + 12 = 11 <answer> - 1 + ( 20 - 8 ) </answer>"),
        ("3 - (5 - 9)", "5 - 9 = -4, 3 - -4 = 7 <answer> 3 - ( 5 - 9 ) </answer>"),
        ("7", " <answer> 7 </answer>"),
    ],
)
def test_steps(expression, steps):
    assert reasoning.work_out(expression) == steps


def test_a_kind_with_few_puzzles():
    pytest.importorskip("reasoning_gym")
    parts = reasoning.load("chain_sum", 1)
    assert [len(part) for part in parts] == [1, 0, 0]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[reasoning\]'"):
        reasoning.load("chain_sum", 9)
