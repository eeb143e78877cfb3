"""The shape of the house: which module may import which, and that every module has its tests."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxppo"

# A module imports only from floors below, or from a module left of it on its own floor.
FLOORS = [
    ["config", "presets", "settings", "types", "masked"],
    ["advantages", "losses", "kl", "aggregate", "kernels"],
    ["models", "sampling", "policy"],
    ["rollout", "rewards", "estimators", "optimizers", "update", "second_order"],
    ["processes", "sharding", "ppo", "supervised", "parallel"],
    [
        "algorithms",
        "fetch",
        "archives",
        "data",
        "manifest",
        "pretrained",
        "memory",
        "checkpoint",
        "lock",
        "signals",
        "tracking",
        "trackers",
    ],
    [
        "chips",
        "hlo",
        "program",
        "costs",
        "profiling",
        "assemble",
        "ladder",
        "sampler",
        "validation",
        "loop",
        "replay",
        "resume",
        "train",
        "sweep",
        "evaluation",
        "statistics",
        "ablation",
        "tasks",
        "sources",
        "task_rewards",
        "measure",
        "stages",
        "plan",
        "records",
        "figures",
        "outcomes",
        "pages",
        "report",
        "export",
        "doctor",
    ],
    ["options", "cli", "__main__", "launch"],
]
PLACES = {
    name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)
}

# Tested elsewhere than the name says.
TESTED_IN = {
    "models/__init__": "models/test_language",
    "pretrained/__init__": "pretrained/test_load",
    "pretrained/tiny": "test_train",  # the smoke-test model of every run there
    "pretrained/errors": "pretrained/test_load",
    "pretrained/outgoing": "test_export",
    "pretrained/card": "test_export",
    "options": "test_cli",
    "settings": "test_config_files",  # pretrained/test_settings has the name
    "figures": "test_report",
    "outcomes": "test_report",
}


def modules() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(source: str) -> set[str]:
    """Top-level modules of jaxppo that a source imports, lazily or not: `jaxppo.data.prompts` is
    `data`.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {
                name.name.split(".")[1] for name in node.names if name.name.startswith("jaxppo.")
            }
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import by the whole name"
            if node.module == "jaxppo":
                found |= {name.name for name in node.names} - {"__version__"}
            elif (node.module or "").startswith("jaxppo."):
                found.add(str(node.module).split(".")[1])
    return found


def forbidden(own: str, source: str) -> list[str]:
    """The imports of a module, or of a part of the package `own`, that go up or to the right."""
    floor, place = PLACES[own]
    wrong = []
    for other in sorted(imported(source) - {own}):
        their_floor, their_place = PLACES[other]
        if not (their_floor < floor or (their_floor == floor and their_place < place)):
            wrong.append(other)
    return wrong


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_go_down_or_left(path):
    own = path.parts[0].removesuffix(".py")
    if own == "__init__":
        assert imported((PACKAGE / path).read_text()) == set()
        return
    assert own in PLACES, f"{own} has no place on any floor"
    assert forbidden(own, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    ("own", "source", "expected"),
    [
        ("masked", "from jaxppo import config, types", []),
        ("config", "from jaxppo.masked import mean", ["masked"]),  # to the right
        ("losses", "def f():\n    from jaxppo.ppo import repeat", ["ppo"]),  # up, though lazily
        ("data", "import jaxppo.fetch, jaxppo.train, os", ["train"]),
        ("models", "from jaxppo.models import lora", []),  # its own parts
    ],
)
def test_the_rule_itself(own, source, expected):
    assert forbidden(own, source) == expected


def test_the_rows_of_the_readme_are_in_that_order():
    """Every module is in its table, and imports from rows above or its own."""
    table = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .split("| modules | what is in them |")[1]
        .split("\n\n")[0]
    )
    rows = [re.findall(r"`(\w+)(?:\.py|/)`", line.split(" | ")[0]) for line in table.splitlines()]
    row_of = {name: number for number, names in enumerate(rows) for name in names}
    own = {path: path.parts[0].removesuffix(".py") for path in modules()}
    assert set(row_of) == set(own.values()) - {"__init__", "__main__"}
    wrong = [
        f"{path} imports {other}"
        for path, name in own.items()
        if not name.startswith("__")
        for other in imported((PACKAGE / path).read_text()) - {name}
        if row_of[other] > row_of[name]
    ]
    assert wrong == []


@pytest.mark.parametrize("path", modules(), ids=str)
def test_every_module_has_its_tests(path):
    """`losses/token.py` is tested in `tests/losses/test_token.py`, or with its package in
    `tests/test_losses.py`.
    """
    name = path.as_posix().removesuffix(".py")
    if not any(
        isinstance(node, ast.FunctionDef | ast.ClassDef)
        for node in ast.parse((PACKAGE / path).read_text()).body
    ):
        return  # nothing but names
    mirror = TESTED_IN.get(name, f"{path.parent.as_posix()}/test_{path.stem}")
    candidates = [ROOT / "tests" / f"{mirror}.py", ROOT / "tests" / f"test_{path.parts[0]}.py"]
    assert any(candidate.exists() for candidate in candidates), (
        f"none of {[str(c) for c in candidates]}"
    )


def test_the_exceptions_are_needed():
    for name, tested_in in TESTED_IN.items():
        assert (PACKAGE / f"{name}.py").exists()
        assert (ROOT / "tests" / f"{tested_in}.py").exists()


def test_the_package_imports_nothing_heavy():
    """In a process of its own: `import jaxppo` and the settings alone load no library of
    numbers.
    """
    code = "import sys, jaxppo, jaxppo.config; print({'jax', 'numpy', 'flax', 'optax'} & set(sys.modules) or 'light')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "light"
