"""The documentation in docs/: its tables made from the code, and the site itself."""

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jaxppo import config
from jaxppo.cli import help as option_help
from jaxppo.presets import ALGORITHMS
from jaxppo.run import option_names

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_index_has_every_preset_with_its_paper_settings_and_files(pages):
    _, _, *rows = pages.algorithm_index().splitlines()
    assert len(rows) == len(ALGORITHMS)
    for row, (name, preset) in zip(rows, ALGORITHMS.items(), strict=True):
        assert f"**`{name}`**" in row and f"]({preset.paper})" in row
        assert all(config.option(x) in row.replace("--no-", "--") for x in preset.settings)
    assert "`--loss gspo`" in rows[list(ALGORITHMS).index("gspo")]
    assert "`--no-kl-adaptive`" in rows[list(ALGORITHMS).index("grpo")]


def test_the_papers_of_functions_and_modules(pages):
    rows = {row.split("](")[0]: row for row in pages.paper_index().splitlines()}
    for paper, names in {
        "2506.01939": ["losses.correction.top_entropy"],
        "2503.19595": ["advantages.pass_at_k"],
        "2106.09685": ["models.lora"],  # a module
        "1707.06347": ["losses.token.clip", "losses.token.kl_penalty"],
    }.items():
        assert all(f"[`{name}`]" in rows[f"| [arXiv {paper}"] for name in names)


def test_the_files_of_a_preset(pages):
    assert pages.source_files("gspo") == ["losses/sequence.py", "advantages.py"]
    assert pages.source_files("npg") == ["second_order.py", "advantages.py"]
    assert pages.source_files("reinforce_baseline")[0] == "losses/token.py"
    for name in ALGORITHMS:
        assert all((DOCS.parent / "jaxppo" / file).is_file() for file in pages.source_files(name))


def test_the_settings_are_complete(pages):
    text = pages.settings_list()
    names = set(config.RunConfig.__dataclass_fields__) - set(option_help.NEVER)
    assert set(re.findall(r"^\| `--([\w-]+)` \|", text, re.MULTILINE)) == {
        name.replace("_", "-") for name in names
    }


def test_the_names_of_other_libraries(pages):
    text = pages.option_name_tables()
    assert "| `cliprange` | `clip_low`, `clip_high` |" in text
    assert text.count("\n### ") + 1 == len(option_names.LIBRARIES)


def test_every_mark_is_on_a_page(pages):
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    assert all(text.count(mark) == 1 for mark in pages.MADE)


def test_docstrings_become_restructured_text(pages):
    found = pages.rst_lines(
        [
            "|x| of `y`s, a_ and f(*a):",
            "",
            "    a = b",
            "",
            "Args:",
            "  x: of `a`.",
            "",
            "one   two",
        ]
    )
    assert found == [
        "\\|x\\| of ``y``\\ s, a\\_ and f(\\*a):", "", "::", "", "        a = b", "",
        "Args:", "  x: of ``a``.", "", "::", "", "    one   two",
    ]  # fmt: skip
    assert doctest.testmod(pages).failed == 0


def test_every_page_is_in_a_table_of_contents():
    """Sphinx warns, too, but only with the extra `docs`."""
    listed = {"index"}
    for path in DOCS.rglob("*.md"):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text("utf-8"), re.DOTALL):
            here = path.parent.relative_to(DOCS)
            listed |= {(here / x).as_posix() for x in re.findall(r"^[\w/]+$", block, re.MULTILINE)}
    found = {x.relative_to(DOCS).with_suffix("").as_posix() for x in DOCS.rglob("*.md")}
    assert found == listed


@pytest.mark.ci
def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(pages, tmp_path):
    """Sphinx checks the links between pages, and to files of the repository."""
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run([*build, DOCS, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    built = list(tmp_path.rglob("*.html"))
    assert len(built) > 25
    for path in built:
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//([^"]*)', text)
        loaded += re.findall(r'<link rel="stylesheet"[^>]* href="(?:https?:)?//([^"]*)', text)
        assert set(loaded) <= {"colab.research.google.com/assets/colab-badge.svg"}, path.name
