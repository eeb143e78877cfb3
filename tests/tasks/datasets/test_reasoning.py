"""Puzzles: distinct, the same for the same seed, with answers that the package calls right."""

import sys

import pytest

from jaxppo.errors import UserError
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
    checker = reasoning._dataset(task, size=1, seed=0)
    for row in rows:
        assert row.reference == answer(row.prompt)
        entry = {"answer": row.reference, "metadata": row.extra["metadata"]}
        assert checker.score_answer(row.reference, entry) == 1
    assert max(len(row.prompt) for row in rows) < 70


def test_seeds(task):
    prompts = lambda parts: [{row.prompt for row in part} for part in parts]
    first, again, other = (prompts(reasoning.load(task, 100, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert len(set.union(*first) & set.union(*other)) < 20


def test_a_kind_with_few_puzzles():
    pytest.importorskip("reasoning_gym")
    parts = reasoning.load("chain_sum", 1)
    assert [len(part) for part in parts] == [1, 0, 0]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[reasoning\]'"):
        reasoning.load("chain_sum", 9)
