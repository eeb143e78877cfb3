"""The pinned versions are those of all that pyproject.toml asks for, and lie within its ranges."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT_OUT = ("parity", "cuda12", "cuda13", "tpu")  # large, or for one kind of machine


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_pins(version):
    text = (ROOT / "requirements" / f"py{version.replace('.', '')}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+!]*", line) for line in lines)  # no addresses, no paths
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(x for name, asked in extras.items() if name not in LEFT_OUT for x in asked)]
    for requirement in map(Requirement, wanted):
        if requirement.name in ("jaxppo", "pip"):
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True), requirement
    assert pins["jax"].startswith({"3.11": "0.10.", "3.12": "0.12."}[version])
