"""The pinned versions cover all dependencies in pyproject.toml, within their ranges."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# large, for some machines only, or for the site
LEFT_OUT = ("parity", "cuda12", "cuda13", "tpu", "docs")
PYTHONS = {"3.11": "requirements/py311.txt", "3.12": "requirements/py312.txt"}
# The libtpu that jax[tpu] of these versions requires.
LIBTPU = {"0.10.2": "==0.0.42.*", "0.12.0.1": "==0.0.50.*"}
OTHER_NAMES = {"profanity_check": "alt-profanity-check", "markdown_it": "markdown-it-py"}


def pinned(path: str) -> dict[str, str]:
    """Return versions by name. The file has only names and versions: no addresses, no paths."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+!]*", line) for line in lines)
    pins = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
    }
    assert len(pins) == len(lines)
    return pins


def for_python(lines: list[str], version: str) -> list[Requirement]:
    """Return the requirements for this Python."""
    found = [Requirement(line) for line in lines]
    return [x for x in found if x.marker is None or x.marker.evaluate({"python_version": version})]


@pytest.mark.parametrize("version", PYTHONS)
def test_pins(version):
    pins = pinned(PYTHONS[version])
    extras = PROJECT["optional-dependencies"]
    wanted = [
        *PROJECT["dependencies"],
        *(x for name, asked in extras.items() if name not in LEFT_OUT for x in asked),
    ]
    for requirement in for_python(wanted, version):
        if requirement.name in ("jaxppo", "pip"):
            continue
        assert requirement.specifier.contains(
            pins[canonicalize_name(requirement.name)], prereleases=True
        ), requirement
    assert pins["jax"].startswith({"3.11": "0.10.", "3.12": "0.12."}[version])


@pytest.mark.parametrize("path", [*PYTHONS.values(), "tpu/requirements.txt"])
def test_libtpu_fits_the_pinned_jax(path):
    pins = pinned(path)
    assert Requirement(f"libtpu{LIBTPU[pins['jax']]}").specifier.contains(pins["libtpu"])


@pytest.mark.parametrize("version", PYTHONS)
def test_the_planning_compiler_is_pinned_for_each_python(version):
    """pip keeps the libtpu of an installed JAX, so `jax[tpu]` is required as well."""
    first, second = for_python(PROJECT["optional-dependencies"]["tpu-plan"], version)
    assert (first.name, first.extras) == ("jax", {"tpu"})
    assert str(second.specifier) == f"=={pinned(PYTHONS[version])['libtpu']}"


def test_libtpu_of_the_installed_jax_is_known():
    """Compare with the metadata of the installed JAX."""
    version = importlib.metadata.version("jax")
    if version not in LIBTPU:
        pytest.skip(f"nothing is pinned for JAX {version}")
    found = [Requirement(line) for line in importlib.metadata.requires("jax") or ()]
    (compiler,) = [
        x for x in found if x.name == "libtpu" and x.marker and x.marker.evaluate({"extra": "tpu"})
    ]
    assert str(compiler.specifier) == LIBTPU[version]


def skipped_without() -> set[str]:
    """Return the modules without which a test is skipped."""
    calls = [
        x
        for path in (ROOT / "tests").rglob("test_*.py")
        for x in ast.walk(ast.parse(path.read_text()))
    ]
    names = [
        x.args[0]
        for x in calls
        if isinstance(x, ast.Call) and ast.unparse(x.func) == "pytest.importorskip"
    ]
    return {name.value.split(".")[0] for name in names if isinstance(name, ast.Constant)}


def test_extras_have_every_package_that_tests_need():
    extras = [x for lines in PROJECT["optional-dependencies"].values() for x in lines]
    known = {
        canonicalize_name(Requirement(line).name) for line in [*PROJECT["dependencies"], *extras]
    }
    for path in PYTHONS.values():
        known |= pinned(path).keys()
    names = skipped_without()
    assert {"torch", "peft", "gguf", "markdown_it"} <= names
    known.add("datasets")  # what a user brings: `train.policy` takes its type, nothing imports it
    assert {x for x in names if canonicalize_name(OTHER_NAMES.get(x, x)) not in known} == set()


def test_the_repository_address():
    """The repository's address is the same in pyproject.toml, CITATION.cff, README and notebook."""
    place = PROJECT["urls"]["Repository"]
    assert all(x.startswith(place) for x in PROJECT["urls"].values())
    assert f"\nrepository-code: {place}\n" in (ROOT / "CITATION.cff").read_text()
    badge = f"(https://colab.research.google.com/github/{place.removeprefix('https://github.com/')}/blob/main/"
    assert badge in (ROOT / "README.md").read_text()
    assert f'\nREPOSITORY = "{place}" ' in (ROOT / "experiments" / "notebook_cells.py").read_text()
    assert PROJECT["authors"] == [{"name": "The jaxppo authors"}]
    assert "\n  - name: The jaxppo authors\n" in (ROOT / "CITATION.cff").read_text()
