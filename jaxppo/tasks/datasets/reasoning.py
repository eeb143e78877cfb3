"""Generated puzzles with a checker, from the package reasoning-gym 0.1.25 (Apache-2.0;
the extra `reasoning`). Nothing is downloaded.

Stojanovski et al. 2025, https://arxiv.org/abs/2505.24760. Of its hundred kinds these
are two that a small model can learn, with settings for short answers and prompts, and
two whose references are worked solutions.
"""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxppo.data.examples import Example, Examples, split_examples
from jaxppo.errors import UserError
from jaxppo.rewards import answers

SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
UNITS = " Give the result as your final answer. Do not include units."


class Puzzle(NamedTuple):
    """One kind of puzzle."""

    settings: Mapping[str, int]  # of the package's generator
    # from a puzzle's metadata, and its "question" and "answer"
    prompt: Callable[[Mapping[str, Any]], str]
    reference: Callable[[Mapping[str, Any]], str] = lambda data: data["answer"].lower()


def work_out(expression: str) -> str:
    """Write the steps of an expression of integers, and the expression as the answer.
    A space before each number gives it the same tokens everywhere.

    >>> work_out("3 + 2*5")
    '2 * 5 = 10, 3 + 10 = 13 <answer> 3 + 2 * 5 </answer>'
    """
    steps: list[str] = []

    def value(text: str) -> str:
        found = answers.evaluate(text)
        assert found is not None, text
        return str(found[0])

    def write(node: ast.AST) -> str:
        if not isinstance(node, ast.BinOp):  # a number, perhaps below 0
            return ast.unparse(node)
        left, right = write(node.left), write(node.right)
        sign = SIGNS[type(node.op)]
        result = value(f"({left}){sign}({right})")
        steps.append(f"{left} {sign} {right} = {result}")
        return result

    write(ast.parse(expression, mode="eval").body)
    spaced = " ".join(re.findall(r"\d+|\S", expression))
    return f"{', '.join(steps)} <answer> {spaced} </answer>"


TASKS: dict[str, Puzzle] = {
    # Spell backward: sun -> nus
    "spell_backward": Puzzle(
        {"min_word_len": 3, "max_word_len": 12},
        lambda data: f"Spell backward: {data['word'].lower()}",
    ),
    # 12 + 7 - 30 = -> -11
    "chain_sum": Puzzle(
        {"min_terms": 2, "max_terms": 3, "max_digits": 2}, lambda data: f"{data['expression']} ="
    ),
    # 3 5 7 -> 26: 3 * 7 = 21, 21 + 5 = 26 <answer> 3 * 7 + 5 </answer>
    "countdown": Puzzle(
        {
            **{"min_numbers": 3, "max_numbers": 3, "min_value": 1, "max_value": 12},
            **{"min_target": 1, "max_target": 60},
        },
        lambda data: f"{' '.join(map(str, sorted(data['numbers'])))} -> {data['target']}",
        lambda data: work_out(data["answer"]),
    ),
    # a question of GSM8K with other names and numbers: the steps and "#### 42"
    "gsm_symbolic": Puzzle(
        {}, lambda data: data["question"].removesuffix(UNITS), lambda data: data["answer_cot"]
    ),
}


def load(task: str, size: int, **settings: int) -> Examples:
    """Generate distinct puzzles of one kind, split by prompt.

    Args:
        task: a name in TASKS.
        size: puzzles in all parts together, or fewer if the kind has fewer.
        settings: of the package's generator, instead of the kind's own.

    Raises UserError without the package.
    """
    generated = _dataset(task, size=8 * size + 1000, **settings)
    found: dict[str, Example] = {}
    kind = TASKS[task]
    for puzzle in generated:
        data = {**puzzle["metadata"], "question": puzzle["question"], "answer": puzzle["answer"]}
        prompt = kind.prompt(data)
        if prompt not in found:
            texts = {name: str(data[name]) for name in ("numbers", "target") if name in data}
            extra = {"task": task, "metadata": puzzle["metadata"], **texts}
            found[prompt] = Example(prompt, kind.reference(data), extra)
        if len(found) == size:
            break
    return split_examples(list(found.values()))


def _dataset(task: str, *, size: int, **settings: int) -> Any:
    try:
        import reasoning_gym  # type: ignore[import-not-found] # an optional extra
    except ImportError:
        raise UserError(
            "puzzles need the package reasoning-gym: pip install -e '.[reasoning]'"
        ) from None
    own = {**TASKS[task].settings, **settings}
    return reasoning_gym.create_dataset(task, size=size, seed=0, **own)
