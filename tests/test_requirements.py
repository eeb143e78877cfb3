"""The pinned versions are those of all that pyproject.toml asks for, and lie within its ranges."""

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
LEFT_OUT = ("parity", "cuda12", "cuda13", "tpu")  # large, or for one kind of machine
PYTHONS = {"3.11": "requirements/py311.txt", "3.12": "requirements/py312.txt"}
LIBTPU = {
    "0.10.2": "==0.0.42.*",
    "0.12.0.1": "==0.0.50.*",
}  # what jax[tpu] of that version asks for
OTHER_NAMES = {"profanity_check": "alt-profanity-check", "markdown_it": "markdown-it-py"}


def pinned(path: str) -> dict[str, str]:
    """Versions by name. Nothing but names and versions stands there: no addresses, no paths."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+!]*", line) for line in lines)
    pins = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
    }
    assert len(pins) == len(lines)
    return pins


def asked(lines: list[str], version: str) -> list[Requirement]:
    """Those of the requirements that are for this Python."""
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
    for requirement in asked(wanted, version):
        if requirement.name in ("jaxppo", "pip"):
            continue
        assert requirement.specifier.contains(
            pins[canonicalize_name(requirement.name)], prereleases=True
        ), requirement
    assert pins["jax"].startswith({"3.11": "0.10.", "3.12": "0.12."}[version])


@pytest.mark.parametrize("path", [*PYTHONS.values(), "tpu/requirements.txt"])
def test_the_compiler_for_tpus_is_that_of_the_pinned_jax(path):
    pins = pinned(path)
    assert Requirement(f"libtpu{LIBTPU[pins['jax']]}").specifier.contains(pins["libtpu"])


@pytest.mark.parametrize("version", PYTHONS)
def test_the_compiler_that_plans_is_pinned_for_each_python(version):
    """pip never replaces that of a JAX that is there by another: jax[tpu], which knows, is asked
    for beside it.
    """
    first, second = asked(PROJECT["optional-dependencies"]["tpu-plan"], version)
    assert (first.name, first.extras) == ("jax", {"tpu"})
    assert str(second.specifier) == f"=={pinned(PYTHONS[version])['libtpu']}"


def test_what_jax_asks_for_is_known():
    """By the metadata of the JAX that is installed."""
    version = importlib.metadata.version("jax")
    if version not in LIBTPU:
        pytest.skip(f"of JAX {version} nothing is pinned")
    found = [Requirement(line) for line in importlib.metadata.requires("jax") or ()]
    (compiler,) = [
        x for x in found if x.name == "libtpu" and x.marker and x.marker.evaluate({"extra": "tpu"})
    ]
    assert str(compiler.specifier) == LIBTPU[version]


def skipped_without() -> set[str]:
    """The modules without which some test is left out."""
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


def test_no_test_is_left_out_for_want_of_what_no_extra_has():
    extras = [x for lines in PROJECT["optional-dependencies"].values() for x in lines]
    known = {
        canonicalize_name(Requirement(line).name) for line in [*PROJECT["dependencies"], *extras]
    }
    for path in PYTHONS.values():
        known |= pinned(path).keys()
    names = skipped_without()
    assert {"torch", "peft", "gguf", "markdown_it"} <= names
    assert {x for x in names if canonicalize_name(OTHER_NAMES.get(x, x)) not in known} == set()


def test_where_it_comes_from():
    """The repository, the same in the package's metadata, in what is cited, in the README's badge
    and for the notebook.
    """
    place = PROJECT["urls"]["Repository"]
    assert all(x.startswith(place) for x in PROJECT["urls"].values())
    assert f"\nrepository-code: {place}\n" in (ROOT / "CITATION.cff").read_text()
    badge = f"(https://colab.research.google.com/github/{place.removeprefix('https://github.com/')}/blob/main/"
    assert badge in (ROOT / "README.md").read_text()
    assert f'\nREPOSITORY = "{place}" ' in (ROOT / "experiments" / "colab.py").read_text()
    assert PROJECT["authors"] == [{"name": "The jaxppo authors"}]
    assert "\n  - name: The jaxppo authors\n" in (ROOT / "CITATION.cff").read_text()
