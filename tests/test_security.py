"""No code of the package runs text from outside as a program; checked on the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("jaxppo", "experiments", "tpu") for path in (ROOT / folder).rglob("*.py")
)

RUN_TEXT = {"eval", "exec", "compile", "__import__"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NEVER = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "tempfile.mktemp",
    "shutil.unpack_archive",
    "torch.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pandas.read_pickle",
}


def origins(tree: ast.Module) -> dict[str, str]:
    """Return what the names of a module stand for: `import numpy as np` gives np -> numpy. Its own
    functions are not builtins.
    """
    names = {
        node.name: f"own.{node.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """Return the full name of an expression such as np.load; empty for others."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def is_false(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def in_imports(node: ast.AST) -> Iterator[str]:
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    yield from (f"imports {module}" for module in modules if module.split(".")[0] in UNPICKLERS)


def in_names(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    used = isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)
    name = dotted(node, names).removeprefix("builtins.") if used else ""
    if name in NEVER or name in RUN_TEXT:
        yield name


def in_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name, given = dotted(node.func, names), {word.arg: word.value for word in node.keywords}
    if name == "numpy.load" and not is_false(given.get("allow_pickle")):
        yield "numpy.load without allow_pickle=False"
    if name.endswith("import_module") and node.args and isinstance(node.args[0], ast.Constant):
        yield from (
            f"imports {node.args[0].value}"
            for _ in range(str(node.args[0].value).split(".")[0] in UNPICKLERS)
        )
    for word in ("shell", "trust_remote_code"):
        if word in given and not is_false(given[word]):
            yield f"{word} may be true"
    if isinstance(node.func, ast.Attribute) and node.func.attr == "extractall":
        kept = given.get("filter")
        if not (isinstance(kept, ast.Constant) and kept.value == "data"):
            yield "extractall without filter='data'"


def in_dict(node: ast.Dict) -> Iterator[str]:
    """Find settings that may be passed on with **."""
    for key, value in zip(node.keys, node.values, strict=True):
        if (
            isinstance(key, ast.Constant)
            and key.value in ("shell", "trust_remote_code", "allow_pickle")
            and not is_false(value)
        ):
            yield f"{key.value} may be true"


def findings(source: str) -> list[str]:
    """Return what breaks a rule, with its line."""
    tree = ast.parse(source)
    names, found = origins(tree), []
    for node in ast.walk(tree):
        broken = [*in_imports(node), *in_names(node, names)]
        broken += in_call(node, names) if isinstance(node, ast.Call) else []
        broken += in_dict(node) if isinstance(node, ast.Dict) else []
        found += [f"line {node.lineno}: {rule}" for rule in broken]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_from_outside_is_run(path):
    assert findings(path.read_text("utf-8")) == []


def test_the_sources_are_found():
    names = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {
        "jaxppo/cli/__init__.py",
        "jaxppo/pretrained/gguf.py",
        "jaxppo/losses/token.py",
        "experiments/sentiment.py",
    } <= names


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("eval('1')", "eval"),
        ("exec('1')", "exec"),
        ("compile('1', '', 'eval')", "compile"),
        ("__import__('os')", "__import__"),
        ("run = eval", "eval"),
        ("import builtins\nbuiltins.exec('1')", "exec"),
        ("from builtins import eval as e\ne('1')", "eval"),
        *((f"import {module}", f"imports {module}") for module in sorted(UNPICKLERS)),
        ("def f():\n    from pickle import loads", "imports pickle"),
        ("import dill as json", "imports dill"),
        ("import joblib.externals", "imports joblib.externals"),
        ("import importlib\nimportlib.import_module('pickle')", "imports pickle"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("from torch import load\nload('x')", "torch.load"),
        ("import numpy as np\nnp.load('x')", "numpy.load without"),
        ("import numpy\nnumpy.load('x', allow_pickle=True)", "numpy.load without"),
        ("from numpy import load as read\nread('x', allow_pickle=flag)", "numpy.load without"),
        ("import yaml\nyaml.load('x', yaml.Loader)", "yaml.load"),
        ("import yaml\nyaml.unsafe_load('x')", "yaml.unsafe_load"),
        ("AutoModel.from_pretrained('x', trust_remote_code=True)", "trust_remote_code may be true"),
        ("options = {'trust_remote_code': flag}", "trust_remote_code may be true"),
        ("options = {'allow_pickle': True}", "allow_pickle may be true"),
        ("import os\nos.system('x')", "os.system"),
        ("from os import system as s\ns('x')", "os.system"),
        ("import os\nos.popen('x')", "os.popen"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "shell may be true"),
        ("from subprocess import Popen\nPopen('x', shell=flag)", "shell may be true"),
        ("import subprocess\nsubprocess.getoutput('x')", "subprocess.getoutput"),
        ("import tarfile\ntarfile.open('x').extractall('y')", "extractall without"),
        (
            "import tarfile\nwith tarfile.open('x') as t:\n    t.extractall('y', filter='tar')",
            "extractall without",
        ),
        ("import shutil\nshutil.unpack_archive('x')", "shutil.unpack_archive"),
        ("import tempfile\ntempfile.mktemp()", "tempfile.mktemp"),
        ("from tempfile import mktemp\nmktemp()", "tempfile.mktemp"),
    ],
)
def test_each_rule_finds(source, rule):
    assert any(rule in found for found in findings(source)), findings(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "step.lower(x).compile()",
        "class Options:\n    compile: bool = False\noptions.compile",
        "def compile(step):\n    return step\ncompile(f)",
        "model.eval()",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import yaml\nyaml.safe_load('x')",
        "import json\njson.load(file)",
        "AutoConfig.from_pretrained('x', trust_remote_code=False)",
        "import subprocess\nsubprocess.run(['x'], shell=False)",
        "tar.extractall('y', filter='data')",
        "import tempfile\ntempfile.mkdtemp()",
        "from .pickle_free import x",
    ],
)
def test_safe_code_passes(source):
    assert findings(source) == []
