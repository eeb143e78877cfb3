"""The documents name only files, tests and modules that exist, and every shell block and script is
valid.
"""

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from follow_readme import shell_blocks

ROOT = Path(__file__).parents[1]


@cache
def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


# --- Names ---

PATH = re.compile(r"(?<![\w/.<>-])[\w./-]*\w\.(?:py|sh|json|npz|ipynb|md)\b")
TEST = re.compile(r"(?<![\w/.])test_\w+(?![\w*]*\.py)")
# Files of the reader, and of a run.
EXAMPLES = re.compile(r"runs/.*|mine\.py|(config|result|lock|tokenizer)\.json")
# Variables of examples, fields of a rollout, and settings of other libraries.
NOT_MODULES = re.compile(
    r"jaxppo\.(run\.(metrics|sample|export|folder)|rollout\.(attend|mask|rewards|n|name|dtype|temperature))"
)
NOT_TESTS = {"test_freq"}


def find_path(path: str, folder: Path) -> Path | None:
    """The file that a document in `folder` means: relative to it, the root, or a part of the code.

    A name without a folder may be anywhere in jaxppo.
    """
    places = [folder, *(ROOT / name for name in ("", "jaxppo", "tests", "experiments", "tpu"))]
    found = [place / path for place in places if (place / path).is_file()]
    if not found and "/" not in path:
        found = [file for file in tracked("jaxppo") if file.name == path]
        found += [ROOT / "experiments" / "benchmarks" / path]
    return next((file for file in found if file.is_file()), None)


def module_exists(name: str) -> bool:
    """Whether `jaxppo.a.b` is a module, or a name in the source of the module `jaxppo.a`."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    parent, _, last = name.rpartition(".")
    place = ROOT / parent.replace(".", "/")
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    defined = rf"^(def|class) {last}\b|^{last}\b.*=|^ *from .* import .*\b{last}\b|^    {last},"
    return source.is_file() and bool(re.search(defined, source.read_text(), re.MULTILINE))


@cache
def known_tests() -> set[str]:
    """The test functions, and the files without `.py`."""
    files = tracked("tests/*.py")
    functions = [re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE) for file in files]
    return {file.stem for file in files} | {name for names in functions for name in names}


def unknown_modules(text: str, *, whole: bool = True) -> list[str]:
    """`jaxppo.a.b`, and unless `whole` also `a.b` of a module `jaxppo.a`, that does not exist."""
    names = re.findall(r"`(jaxppo(?:\.\w+)+)", text)
    if not whole:
        text = re.sub(r"[\w/]+\.(py|jsonl?)\b", "", text)
        inner = re.findall(r"`(\w+(?:\.\w+)+)(?![\w/-])", text)
        names += [f"jaxppo.{x}" for x in inner if module_exists(f"jaxppo.{x.split('.')[0]}")]
    names = [name for name in names if not NOT_MODULES.fullmatch(name)]
    return [name for name in names if not module_exists(name)]


def unknown_names(text: str, folder: Path) -> list[str]:
    """The files, tests and modules in a text that do not exist."""
    text = re.sub(r"https?://\S+", "", text)
    paths = [x for x in PATH.findall(text) if not EXAMPLES.fullmatch(x)]
    wrong = [path for path in paths if not find_path(path, folder)]
    for path, test in re.findall(r"([\w/]+\.py)::(test_\w+)", text):
        file = find_path(path, folder)
        if file and f"def {test}(" not in file.read_text():
            wrong.append(f"{path}::{test}")
    wrong += [name for name in TEST.findall(text) if name not in known_tests() | NOT_TESTS]
    return wrong + unknown_modules(text, whole=False)


@pytest.mark.parametrize("path", tracked("*.md"), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_what_exists(path):
    text = path.read_text()
    if path.name == "CHANGELOG.md":  # the first column of its table has old names
        text = re.sub(r"^ *\|[^|\n]*\|", "|", text, flags=re.MULTILINE)
    assert unknown_names(text, path.parent) == []


def test_sources_name_modules_that_exist():
    wrong = []
    for file in tracked("jaxppo/*.py", "experiments/*.py", "tpu/*.py"):
        text = file.read_text()
        paths = re.findall(r"(?<![\w/.<-])(?:jaxppo|tests|experiments|tpu)/[\w/]+\.py\b", text)
        names = [*unknown_modules(text), *(path for path in paths if not (ROOT / path).is_file())]
        wrong += [f"{file.relative_to(ROOT)}: {name}" for name in names]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`jaxppo/ppo.py`, ppo.py, `tests/test_ppo.py`, `experiments/sentiment.py --tiny`", []),
        ("`jaxppo/tracking.py` and gone.py", ["jaxppo/tracking.py", "gone.py"]),
        ("`test_documents_name_what_exists`, test_documents.py", []),
        ("`test_of_nothing`", ["test_of_nothing"]),
        ("`test_ppo.py::test_every_script_is_valid`", ["test_ppo.py::test_every_script_is_valid"]),
        ("`jaxppo.train.fit`, `ppo.make_train_step`, `jaxppo.losses`, `config.json`", []),
        ("`jaxppo.loop` and `run.load.nothing`", ["jaxppo.loop", "jaxppo.run.load.nothing"]),
    ],
)
def test_unknown_names_are_found(text, expected):
    assert unknown_names(text, ROOT) == expected


# --- Shell ---


def scripts() -> list[Path]:
    """Tracked files that a shell runs."""
    first = (b"#!/usr/bin/env bash", b"#!/bin/bash", b"#!/bin/sh")
    return [
        path
        for path in tracked()
        if path.suffix == ".sh" or path.read_bytes()[:30].startswith(first)
    ]


BLOCKS = [(path, block) for path in tracked("*.md") for block in shell_blocks(path.read_text())]


def syntax_errors(script: str) -> str:
    return subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True).stderr


@pytest.mark.parametrize(
    ("path", "block"),
    BLOCKS,
    ids=[f"{path.relative_to(ROOT)}-{i}" for i, (path, _) in enumerate(BLOCKS)],
)
def test_every_shell_block_is_valid(path, block):
    assert syntax_errors(block) == ""


def test_shell_blocks_are_found():
    assert {"README.md", "tpu/README.md", "tpu/elsewhere.md"} <= {
        path.relative_to(ROOT).as_posix() for path, _ in BLOCKS
    }
    text = (
        "a\n\n    python x.py  # do\n\n```sh\nls\n```\n\n```python\nif x: {\n```\n\n"
        "    prompts -> rollout\n\n```console\n$ ls (\n```\n"
    )
    found = shell_blocks(text)
    assert found == ["ls\n", "ls (\n", "    python x.py  # do\n"]
    assert [bool(syntax_errors(block)) for block in found] == [False, True, False]


@pytest.mark.parametrize("path", scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_is_valid(path):
    assert syntax_errors(path.read_text()) == ""
    beside_python = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    checker = beside_python or shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is missing; the extra `test` has it")
    done = subprocess.run([checker, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_are_found():
    assert {"tpu/job.sh", "tpu/setup_vm.sh"} <= {
        path.relative_to(ROOT).as_posix() for path in scripts()
    }
