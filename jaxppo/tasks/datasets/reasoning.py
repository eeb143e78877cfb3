"""Generated puzzles with a checker, from the package reasoning-gym 0.1.25 (Apache-2.0;
the extra `reasoning`). Nothing is downloaded.

Stojanovski et al. 2025, https://arxiv.org/abs/2505.24760. Of its hundred kinds these
are three that a small model can learn, with settings for short answers and prompts.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.errors import UserError


class Puzzle(NamedTuple):
    """One kind of puzzle."""

    settings: Mapping[str, int]  # of the package's generator
    prompt: Callable[[Mapping[str, Any]], str]  # from a puzzle's metadata


TASKS: dict[str, Puzzle] = {
    # Spell backward: sun -> nus
    "spell_backward": Puzzle(
        {"min_word_len": 3, "max_word_len": 8},
        lambda data: f"Spell backward: {data['word'].lower()}",
    ),
    # 12 + 7 - 30 = -> -11
    "chain_sum": Puzzle(
        {"min_terms": 2, "max_terms": 3, "max_digits": 2}, lambda data: f"{data['expression']} ="
    ),
    # How many e in "The telephone"? -> 4
    "letter_counting": Puzzle(
        {"min_words": 1, "max_words": 3},
        lambda data: f'How many {data["target_letter"]} in "{" ".join(data["span"])}"?',
    ),
}


def load(task: str, size: int, seed: int = 0) -> Examples:
    """Generate distinct puzzles of one kind, split by prompt.

    Args:
        task: a name in TASKS.
        size: puzzles in all parts together, or fewer if the kind has fewer.
        seed: another seed gives other puzzles and another split.

    Raises UserError without the package.
    """
    # The package makes puzzle i from seed + i: neighbouring seeds would share puzzles.
    generated = _dataset(task, size=8 * size + 1000, seed=seed * 2**32)
    found: dict[str, Example] = {}
    for puzzle in generated:
        data = puzzle["metadata"]
        prompt = TASKS[task].prompt(data)
        extra = {"task": task, "metadata": data}
        found.setdefault(prompt, Example(prompt, puzzle["answer"].lower(), extra))
        if len(found) == size:
            break
    return split_examples(list(found.values()), seed=seed)


def _dataset(task: str, *, size: int, seed: int) -> Any:
    try:
        import reasoning_gym  # type: ignore[import-not-found] # an optional extra
    except ImportError:
        raise UserError(
            "puzzles need the package reasoning-gym: pip install -e '.[reasoning]'"
        ) from None
    return reasoning_gym.create_dataset(task, size=size, seed=seed, **TASKS[task].settings)
