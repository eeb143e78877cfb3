"""Short puzzles without end, each with a checker, from the package reasoning-gym 0.1.25
(Apache-2.0; the extra `reasoning`).

Stojanovski et al. 2025, Reasoning Gym: Reasoning Environments for Reinforcement
Learning with Verifiable Rewards, https://arxiv.org/abs/2505.24760. The package makes a
puzzle from a number; nothing is downloaded. Of its hundred kinds three are here that a
small model can learn, with settings for short prompts and answers, and its long
questions are put in a few words.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.errors import UserError


class Puzzle(NamedTuple):
    """One kind of puzzle."""

    settings: Mapping[str, int]  # of the package's generator
    # from what the package tells of a puzzle
    prompt: Callable[[Mapping[str, Any]], str]


TASKS: dict[str, Puzzle] = {
    # Spell backward: sun -> nus
    "spell_backward": Puzzle(
        {"min_word_len": 3, "max_word_len": 8},
        lambda told: f"Spell backward: {told['word'].lower()}",
    ),
    # 12 + 7 - 30 = -> -11
    "chain_sum": Puzzle(
        {"min_terms": 2, "max_terms": 3, "max_digits": 2}, lambda told: f"{told['expression']} ="
    ),
    # How many e in "The telephone"? -> 4
    "letter_counting": Puzzle(
        {"min_words": 1, "max_words": 3},
        lambda told: f'How many {told["target_letter"]} in "{" ".join(told["span"])}"?',
    ),
}


def load(task: str, size: int, seed: int = 0) -> Examples:
    """Distinct puzzles of one kind, split by prompt: those of the training part are not
    in the others.

    Args:
        task: a name in TASKS. size: puzzles in all three parts together; fewer come
        back where the kind has fewer. seed: another seed gives other puzzles and
        another split.

    Raises:
        UserError: for an unknown task, a size below 1, or when the package is missing.
    """
    if size < 1:
        raise UserError(f"{size} puzzles make no data; use at least 1")
    # The package makes puzzle i from the number seed + i: neighbouring seeds would
    # share all but one of their puzzles.
    made = _dataset(task, size=8 * size + 1000, seed=seed * 2**32)
    found: dict[str, Example] = {}
    for puzzle in made:
        told = puzzle["metadata"]
        prompt = TASKS[task].prompt(told)
        found.setdefault(
            prompt, Example(prompt, puzzle["answer"].lower(), {"task": task, "metadata": told})
        )
        if len(found) == size:
            break
    return split_examples(list(found.values()), seed=seed)


def make_scorer(task: str) -> Callable[[str, Example], float]:
    """The package's own checker: 1 for the right answer, less for one that is right in
    part, 0 at worst.

    It takes the decoded response and its example. Letters in place count for
    `spell_backward`; 5.0 is 5 for `chain_sum`.

    Raises:
        UserError: for an unknown task, or when the package is missing.
    """
    checker = _dataset(task, size=1, seed=0)

    def check(answer: str, example: Example) -> float:
        return float(
            checker.score_answer(
                answer.strip(), {"answer": example.reference, "metadata": example.extra["metadata"]}
            )
        )

    return check


def _dataset(task: str, *, size: int, seed: int) -> Any:
    if task not in TASKS:
        raise UserError(f"unknown puzzle {task!r}; choose one of {', '.join(TASKS)}")
    try:
        import reasoning_gym  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(
            "puzzles need the package reasoning-gym: pip install -e '.[reasoning]'"
        ) from None
    return reasoning_gym.create_dataset(task, size=size, seed=seed, **TASKS[task].settings)
