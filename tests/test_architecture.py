"""The layout of the package: which module may import which, one home for each name, and a test
file for each module.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxppo"

# Files and folders at the top of jaxppo/. Each imports only from places before it.
ORDER = [
    "errors", "presets", "config", "types", "masked",
    "advantages", "losses", "kl", "aggregate", "kernels",
    "sampling", "models", "packing", "policy",
    "decoding", "rollout", "distillation", "rewards", "estimators", "optimizers", "update",
    "second_order",
    "parallel", "step_metrics", "control", "ppo", "supervised", "algorithms",
    "data", "pretrained", "environments", "costs", "run", "train",
    "ablation", "tasks",
    "cli", "commands", "__main__", "launch",
]  # fmt: skip

# Modules whose tests are in a file of another name.
TESTED_IN = {
    "tasks/optimisation": "tasks/test_stages",
    "models/cells": "models/test_recurrent",
    "decoding/loop": "test_rollout",
    "run/start": "test_train",
    "models/__init__": "models/test_language_model",
    "pretrained/tiny": "test_train",  # the smoke-test model of every run there
}


def name_of(path: Path) -> str:
    """`jaxppo.run.load` of `run/load.py`, `jaxppo.run` of `run/__init__.py`."""
    parts = ("jaxppo", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(source: str) -> list[tuple[str, str]]:
    """(module of jaxppo, name in it, or "" for the module itself) of every import, lazy ones
    too.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(x.name, "") for x in node.names if x.name.split(".")[0] == "jaxppo"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import by the whole name"
            if (node.module or "").split(".")[0] == "jaxppo":
                for x in node.names:
                    whole = f"{node.module}.{x.name}"
                    found.append((whole, "") if whole in SOURCES else (str(node.module), x.name))
    return found


def forbidden(own: str, source: str) -> list[str]:
    """The places that a file of the place `own` imports and that do not come before it."""
    places = {module.split(".")[1] for module, _ in imported(source) if "." in module} - {own}
    return sorted(place for place in places if ORDER.index(place) > ORDER.index(own))


def defined(tree: ast.Module) -> set[str]:
    """Names that a module defines, not those that it imports."""
    names = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    stored = (x for x in ast.walk(tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store))
    return names | {x.id for x in stored}


def attributes(source: str) -> set[tuple[str, str]]:
    """(module of jaxppo, name) of every `module.name` in a source that imports the module."""
    tree, aliases = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for x in node.names:
                if f"{node.module}.{x.name}" in SOURCES:
                    aliases[x.asname or x.name] = f"{node.module}.{x.name}"
    for node in ast.walk(tree):  # a variable of that name hides the module
        hidden = node.arg if isinstance(node, ast.arg) else getattr(node, "id", None)
        if isinstance(node, ast.arg) or isinstance(getattr(node, "ctx", None), ast.Store):
            aliases.pop(hidden, None)
    return {
        (aliases[node.value.id], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in aliases
        and isinstance(node.ctx, ast.Load)
    }


def test_every_place_has_its_order():
    assert {name.split(".")[1] for name in SOURCES if "." in name} == set(ORDER)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"jaxppo"}))
def test_imports_go_downwards(name):
    assert forbidden(name.split(".")[1], SOURCES[name].read_text()) == []


def test_the_package_itself_imports_nothing():
    assert imported(SOURCES["jaxppo"].read_text()) == []


@pytest.mark.parametrize(
    ("own", "source", "expected"),
    [
        ("masked", "from jaxppo import config, types", []),
        ("config", "from jaxppo.masked import mean", ["masked"]),
        ("losses", "def f():\n    from jaxppo.ppo import repeat", ["ppo"]),  # though lazily
        ("data", "import jaxppo.kl, jaxppo.train, os", ["train"]),
        ("models", "from jaxppo.models import lora", []),  # its own files
    ],
)
def test_the_rule_itself(own, source, expected):
    assert forbidden(own, source) == expected


def test_no_module_imports_itself_by_way_of_others():
    below = {
        name: {module for module, _ in imported(path.read_text())} - {name, "jaxppo"}
        for name, path in SOURCES.items()
    }
    while free := [name for name, needed in below.items() if not needed & set(below)]:
        for name in free:
            del below[name]
    assert below == {}, "modules in a circle, or above one"


@pytest.mark.parametrize("folder", ["jaxppo", "experiments", "tests", "tpu"])
def test_a_name_is_imported_from_its_home(folder):
    """Only a package's `__init__` may pass on what it imports."""
    homes = {m: defined(ast.parse(p.read_text())) for m, p in SOURCES.items()}
    plain = {m for m, path in SOURCES.items() if path.name != "__init__.py"}
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        source = path.read_text()
        uses = {x for x in imported(source) if x[1]}
        if folder != "tests":  # a test may replace what a module imports
            uses |= attributes(source)
        wrong += [
            f"{path.relative_to(ROOT)}: {module}.{name}"
            for module, name in sorted(uses)
            if module in plain and name not in homes[module] and not name.startswith("__")
        ]
    assert wrong == []


def test_the_map_in_the_readme_is_complete():
    """Every file and folder at the top of jaxppo/ is in its table."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| place | what it holds |")[1].split("\n\n")[0]
    cells = " ".join(line.split(" | ")[0] for line in table.splitlines())
    places = {
        name.removesuffix(".py").removesuffix("/") for name in re.findall(r"`([^`]+)`", cells)
    }
    assert set(ORDER) - {"__main__"} <= places


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_module_has_its_tests(name):
    """`losses/token.py` is tested in `tests/losses/test_token.py`, a package in `test_<package>.py`
    in its folder or above it, or in the tests of the whole place.
    """
    path = SOURCES[name]
    tree = ast.parse(path.read_text())
    if not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body):
        return  # nothing but names
    place = path.relative_to(PACKAGE)
    stem = place.parent.name if place.stem == "__init__" else place.stem
    mirror = TESTED_IN.get(
        place.with_suffix("").as_posix(), f"{place.parent.as_posix()}/test_{stem}"
    )
    candidates = [
        ROOT / "tests" / f"{mirror}.py", ROOT / "tests" / f"test_{place.parts[0]}.py",
        ROOT / "tests" / place.parent.parent / f"test_{stem}.py",
    ]  # fmt: skip
    assert any(x.exists() for x in candidates), f"none of {[str(x) for x in candidates]}"


def test_the_exceptions_are_needed():
    for name, tested_in in TESTED_IN.items():
        assert (PACKAGE / f"{name}.py").exists()
        assert (ROOT / "tests" / f"{tested_in}.py").exists()


def test_the_package_imports_nothing_heavy():
    """In a process of its own: `import jaxppo` and the settings load no library of numbers."""
    heavy = "{'jax', 'numpy', 'flax', 'optax'}"
    code = f"import sys, jaxppo, jaxppo.config; print({heavy} & set(sys.modules) or 'light')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "light"
