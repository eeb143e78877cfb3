"""Puzzles: distinct, the same for the same seed, with right answers that the checker knows."""

import sys

import pytest

from jaxppo.data.examples import Example
from jaxppo.errors import UserError
from jaxppo.rewards import answers
from jaxppo.tasks.datasets import reasoning


@pytest.fixture(scope="module", params=reasoning.TASKS)
def task(request) -> str:
    pytest.importorskip("reasoning_gym")
    return request.param


def answer(prompt: str) -> str:
    """Worked out from the prompt alone."""
    if prompt.startswith("Spell backward: "):
        return prompt.split()[-1][::-1]
    if prompt.startswith("How many "):
        letter, text = prompt.removeprefix("How many ").split(" in ", 1)
        return str(text.lower().count(letter))
    sums = prompt.removesuffix(" =").replace("- ", "-").replace("+ ", "").split()
    return str(sum(int(term) for term in sums))


def test_prompts_hold_the_question(task):
    parts = reasoning.load(task, 300)
    assert [len(part) for part in parts] == [240, 30, 30]
    rows = [row for part in parts for row in part]
    assert len({row.prompt for row in rows}) == 300
    check = reasoning.make_scorer(task)
    for row in rows:
        assert row.reference == answer(row.prompt)
        assert check(f" {row.reference}\n", row) == 1
        assert check("?", row) == check("", row) == 0
    assert max(len(row.prompt) for row in rows) < 70


def test_seeds(task):
    prompts = lambda parts: [{row.prompt for row in part} for part in parts]
    first, again, other = (prompts(reasoning.load(task, 100, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert len(set.union(*first) & set.union(*other)) < 20


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


def test_the_package_does_not_judge_what_it_would_evaluate():
    with pytest.raises(UserError, match="judged by jaxppo.rewards.answers"):
        reasoning.make_scorer("countdown")


def test_right_in_part():
    pytest.importorskip("reasoning_gym")
    check = reasoning.make_scorer("spell_backward")
    word = Example("Spell backward: stop", "pots", {"metadata": {}})
    assert check("pots", word) == 1
    assert check("pats", word) == pytest.approx(3 / 4)  # three of four letters in place
    total = Example("2 + 3 =", "5", {"metadata": {}})
    assert reasoning.make_scorer("chain_sum")("5.0", total) == 1
    assert reasoning.make_scorer("chain_sum")("6", total) < 0.1


def test_a_kind_with_few_puzzles():
    pytest.importorskip("reasoning_gym")
    parts = reasoning.load("chain_sum", 1)
    assert [len(part) for part in parts] == [1, 0, 0]


@pytest.mark.parametrize(
    ("task", "size", "message"),
    [("sudoku", 9, "spell_backward, chain_sum"), ("chain_sum", 0, "0 puzzles")],
)
def test_bad_arguments(task, size, message):
    with pytest.raises(UserError, match=message):
        reasoning.load(task, size)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    for use in (lambda: reasoning.load("chain_sum", 9), lambda: reasoning.make_scorer("chain_sum")):
        with pytest.raises(UserError, match=r"pip install -e '\.\[reasoning\]'"):
            use()
