"""What the documents tell people to type is at least a shell's language, and every script is
sound.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from follow_readme import shell_blocks

ROOT = Path(__file__).parents[1]


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def scripts() -> list[Path]:
    """Tracked files that a shell runs."""
    first = (b"#!/usr/bin/env bash", b"#!/bin/bash", b"#!/bin/sh")
    return [
        path
        for path in tracked()
        if path.suffix == ".sh" or path.read_bytes()[:30].startswith(first)
    ]


BLOCKS = [(path, block) for path in tracked("*.md") for block in shell_blocks(path.read_text())]


def unsound(script: str) -> str:
    return subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True).stderr


@pytest.mark.parametrize(
    ("path", "block"),
    BLOCKS,
    ids=[f"{path.relative_to(ROOT)}-{i}" for i, (path, _) in enumerate(BLOCKS)],
)
def test_every_shell_block_of_every_document(path, block):
    assert unsound(block) == ""


def test_the_blocks_are_found():
    assert {"README.md", "tpu/README.md", "tpu/elsewhere.md"} <= {
        path.relative_to(ROOT).as_posix() for path, _ in BLOCKS
    }
    text = "a\n\n    python x.py  # do\n\n```sh\nls\n```\n\n```python\nif x: {\n```\n\n    prompts -> rollout\n\n"
    text += "```console\n$ ls (\n```\n"
    found = shell_blocks(text)
    assert found == ["ls\n", "ls (\n", "    python x.py  # do\n"]
    assert [bool(unsound(block)) for block in found] == [False, True, False]


@pytest.mark.parametrize("path", scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script(path):
    assert unsound(path.read_text()) == ""
    checker = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    if checker is None:
        pytest.skip("shellcheck is missing; the extra `test` has it")
    done = subprocess.run([checker, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_scripts_are_found():
    assert {"tpu/job.sh", "tpu/setup_vm.sh"} <= {
        path.relative_to(ROOT).as_posix() for path in scripts()
    }
