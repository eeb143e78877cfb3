"""An extension of Sphinx: tables made from the code, links to sources, and docstrings
as reStructuredText.

`<!-- algorithm index -->` in a page becomes the table of presets, `<!-- papers -->`
that of the papers that docstrings name, `<!-- settings -->` all settings with their
help, and `<!-- option names -->` their names in other libraries, so that none goes
stale.
"""

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

from jaxppo import algorithms, config
from jaxppo.cli import help as option_help
from jaxppo.presets import ALGORITHMS
from jaxppo.run import option_names

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger(__name__)
SOURCE = "https://github.com/jaxppo/jaxppo/blob/main/"
ADDRESS = re.compile(r"https?://[\w.-]+\.\w+/[^\s)'\"`]*")

# --- Tables made from the code ---


def algorithm_index() -> str:
    """A Markdown table: paper, preset, settings, files of its loss and advantage."""
    rows = ["| paper | preset | settings | files |", "| --- | --- | --- | --- |"]
    for name, preset in ALGORITHMS.items():
        settings = " ".join(f"`{_option(key, x)}`" for key, x in preset.settings.items())
        files = " ".join(f"[{file}]({SOURCE}jaxppo/{file})" for file in source_files(name))
        paper = f"[{_paper_name(preset.paper)}]({preset.paper})"
        rows.append(f"| {paper} | **`{name}`**: {preset.about} | {settings} | {files} |")
    return "\n".join(rows)


def paper_index() -> str:
    """A Markdown table: addresses in the library's docstrings, and whose they are."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "jaxppo").rglob("*.py")):
        file = path.relative_to(ROOT / "jaxppo")
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                for address in ADDRESS.findall(ast.get_docstring(node) or ""):
                    link = f"[`{name}`]({SOURCE}jaxppo/{file.as_posix()})"
                    found.setdefault(address.rstrip(".,;"), []).append(link)
    rows = ["| source | where |", "| --- | --- |"]
    for address, links in sorted(found.items(), key=lambda x: _paper_name(x[0])):
        rows.append(f"| [{_paper_name(address)}]({address}) | {', '.join(dict.fromkeys(links))} |")
    return "\n".join(rows)


def _option(name: str, value: Any) -> str:
    """A setting as an option of the command line."""
    if isinstance(value, bool):
        return config.option(name if value else f"no_{name}")
    return f"{config.option(name)} {value}"


def _paper_name(address: str) -> str:
    """A short name of a paper's address.

    >>> _paper_name("https://arxiv.org/abs/1707.06347"), _paper_name("https://x.org/2-npg")
    ('arXiv 1707.06347', 'x.org')
    """
    if "arxiv.org" in address:
        return f"arXiv {address.rsplit('/', 1)[1]}"
    if "doi.org" in address:
        return f"doi {address.split('/', 4)[4]}"
    return address.split("/")[2].removeprefix("papers.")


def source_files(name: str) -> list[str]:
    """The files of a preset's loss (or other update) and advantage, below jaxppo/."""
    settings = config.Config(**{"algorithm": name, **ALGORITHMS[name].settings})
    if settings.update == "gradient":
        update = algorithms.policy_loss(settings)
    else:
        update = algorithms.UPDATES[settings.update]
    advantage = algorithms.ADVANTAGES[settings.advantage].make(settings)
    homes = [home for f in (update, advantage) for home in _homes(f)]
    # The formula, where there is one, not the wrapper that applies it to a rollout.
    formula = "jaxppo.advantages" in homes
    kept = [x for x in homes if not (formula and x == "jaxppo.estimators")]
    return list(dict.fromkeys(f"{x.removeprefix('jaxppo.').replace('.', '/')}.py" for x in kept))


def _homes(function: Callable) -> Iterator[str]:
    """The modules of a function, and of functions that it closes over or calls."""
    while isinstance(function, functools.partial):
        function = function.func
    yield function.__module__
    if function.__module__ == "jaxppo.estimators":
        found = inspect.getclosurevars(function)
        for inner in found.nonlocals.values():
            if callable(inner):
                yield from _homes(inner)
        if re.search(r"\badvantages\.\w+\(", inspect.getsource(function)):
            yield "jaxppo.advantages"


def settings_list() -> str:
    """All settings as Markdown tables, one for each group: option, default and help."""
    groups: dict[str, list[str]] = {}
    defaults = config.RunConfig()
    for name, (group, text) in option_help.describe(config.RunConfig).items():
        if name not in option_help.NEVER:
            words = text.replace("|", "\\|")
            row = f"| `{config.option(name)}` | `{getattr(defaults, name)!r}` | {words} |"
            groups.setdefault(group, []).append(row)
    head = "| option | default | meaning |\n| --- | --- | --- |\n"
    return "\n\n".join(
        f"## {group.capitalize()}\n\n{head}" + "\n".join(rows) for group, rows in groups.items()
    )


def option_name_tables() -> str:
    """Markdown tables: names of settings in other libraries, and the settings here."""
    parts = []
    for library, names in option_names.LIBRARIES.items():
        rows = [f"### {library[0].upper() + library[1:]}\n", "| there | here |", "| --- | --- |"]
        for there, here in names.items():
            rows.append(f"| `{there}` | {', '.join(f'`{x}`' for x in here.split())} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


MADE = {
    "<!-- algorithm index -->": algorithm_index,
    "<!-- papers -->": paper_index,
    "<!-- settings -->": settings_list,
    "<!-- option names -->": option_name_tables,
}


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the tables into the text of a page."""
    for mark, make in MADE.items():
        if mark in source[0]:
            source[0] = source[0].replace(mark, make())


# --- Links to files of the repository ---


def link_sources(app: Sphinx, page: str, source: list[str]) -> None:
    """Send links to files outside of docs/ to the repository; warn of missing files."""
    folder = Path(app.env.doc2path(page)).parent

    def link(match: re.Match) -> str:
        path = (folder / match[1]).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return match[0]
        if not path.exists():
            log.warning("no such file: %s", match[1], location=page)
        return f"]({SOURCE}{path.relative_to(ROOT)})"

    source[0] = re.sub(r"\]\((\.\./[^)#]+)\)", link, source[0])


# --- Docstrings ---


def to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn a docstring of this project into reStructuredText: names are in single
    backquotes, tables and indented equations are plain text, | and * have no meaning.
    """
    lines[:] = rst_lines(lines)


# the names that the sources use (types.py, masked.py, losses/shared.py)
ALIASES = {
    "float | int | Float[Array, '']": "Scalar",
    "Bool[Array, 'B T'] | Float[Array, 'B T']": "Mask",
    "tuple[Float[Array, 'B T'], dict[str, Float[Array, 'B T']]]": "Loss",
}


def shorten_signature(app, what, name, obj, options, signature, result) -> tuple:
    """Write array types as the sources do: `Float[Array, 'B T']`, `Mask`, `Scalar`."""

    def short(text: str | None) -> str | None:
        text = text and re.sub(r"~?\b(jaxtyping|jax\.jaxlib\._jax|jaxlib\._jax)\.", "", text)
        for long, alias in ALIASES.items():
            text = text and text.replace(long, alias)
        return text

    return short(signature), short(result)


def rst_lines(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText.

    >>> rst_lines(["|x| of `y`:", "", ">>> f(*a)", "1"])
    ['\\\\|x\\\\| of ``y``:', '', '>>> f(*a)', '1']
    """
    found: list[str] = []
    for block in "\n".join(lines).split("\n\n"):
        own = block.split("\n")
        plain = own[0].lstrip().startswith(">>>")
        table = any(re.search(r"\S {3,}\S", line) for line in own)
        indented = all(line.startswith("    ") for line in own if line)
        if plain:
            found += own
        elif table or (indented and not _in_section(found)):
            found += ["::", "", *(f"    {line}" for line in own)]
        else:
            found += _inline(block).split("\n")
        found.append("")
    return found[:-1]


def _in_section(before: list[str]) -> bool:
    """Whether the last line at the margin is the head of a section of arguments."""
    margin = [line for line in before if line and not line.startswith(" ")]
    return bool(margin) and bool(re.fullmatch(r"(Args|Raises|Returns|Yields|Shapes):", margin[-1]))


def _inline(text: str) -> str:
    """Literals for names in backquotes; elsewhere no character has a meaning."""
    parts = re.split(r"(`[^`]+`|https?://[^\s)>,]+)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([*|])", r"\\\1", part)
            parts[i] = re.sub(r"(\w)_(?!\w)", r"\1\\_", parts[i])
        elif part.startswith("`"):
            parts[i] = f"`{part}`"
            if i + 1 < len(parts) and re.match(r"\w", parts[i + 1]):
                parts[i] += "\\ "
    return "".join(parts)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", link_sources)
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", to_rst, priority=100)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
