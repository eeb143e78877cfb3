"""The text of --help for a class of settings: options in the groups of `config.py`."""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import tyro

from jaxppo import algorithms
from jaxppo.config import Config, RunConfig, option

# What --help shows, besides the fields that a script adds.
FIRST = (
    "model", "tiny", "algorithm", "batch_size", "group_size", "prompt_length", "response_length",
    "minibatches", "microbatches", "steps", "lr", "kl_coef", "temperature", "lora", "dtype", "seed",
    "name", "resume", "eval_every", "mesh",
)  # fmt: skip
NEVER = ("eos", "pad", "start", "functions", "chats")  # scripts set them
TABLES = {
    "loss": algorithms.POLICY_LOSSES,
    "advantage": algorithms.ADVANTAGES,
    "aggregate": algorithms.AGGREGATES,
    "value_loss": algorithms.VALUE_LOSSES,
    "correction": algorithms.CORRECTIONS,
    "rejection": algorithms.REJECTIONS,
}
ABOUT = {
    "-h, --help": "show the options that most runs need",
    "--help-all": "show all options",
    "--config FILE": "read settings from a file, `name: value` a line (YAML), or from a run's "
    "config.json; options on the command line override it",
}


def format_help(defaults: Config, *, description: str, prog: str, every: bool = False) -> str:
    """The help of a command: `description`, and the options with their defaults.

    Args:
      every: all options; otherwise `FIRST`, those that a script adds, and the number of
        the others.
    """
    kind, described = type(defaults), describe(type(defaults))
    hints = typing.get_type_hints(kind)
    marked = typing.get_type_hints(kind, include_extras=True)
    common = {x.name for x in dataclasses.fields(RunConfig)}
    groups, arguments, left_out = {"task": {}}, {}, 0
    for name, (group, text) in described.items():
        rows = groups.setdefault(group, {})
        marks = getattr(marked[name], "__metadata__", ())
        if tyro.conf.Suppress in marks:
            continue
        if tyro.conf.Positional in marks:
            arguments[f"[{name.upper()}]"] = text
        elif name not in NEVER and (every or name in FIRST or name not in common):
            rows[_usage(name, hints[name])] = _complete(name, text, getattr(defaults, name))
        else:
            left_out += name not in NEVER
    shown = {"arguments": arguments, **groups, "help and settings": ABOUT}
    blocks = [
        "\n".join([title, *(line for row in rows.items() for line in _lines(*row))])
        for title, rows in shown.items()
        if rows
    ]
    usage = " ".join([f"usage: {prog}", *arguments, "[OPTIONS]"])
    more = [f"{left_out} more options: --help-all"] if left_out else []
    return "\n\n".join([usage, description.strip(), *blocks, *more])


def describe(kind: type) -> dict[str, tuple[str, str]]:
    """The group and the help of each field of a dataclass. The fields of a class
    without comments `# --- title`, such as a script's, are of the group "task".
    """
    found: dict[str, tuple[str, str]] = {}
    for cls in reversed(kind.__mro__):
        for name, group, text in _read_fields(cls) if dataclasses.is_dataclass(cls) else ():
            first = found.get(name, (group, ""))
            found[name] = first[0], text or first[1]
    return {x.name: found.get(x.name, ("task", "")) for x in dataclasses.fields(kind)}


def _read_fields(cls: type) -> Iterator[tuple[str, str, str]]:
    """Name, group and help of the fields in the source of a class, if it has one."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return
    found = ast.parse(source).body[0]
    titles = [re.match(r"    # --- (.*)", line) for line in source.splitlines()]
    nodes = found.body if isinstance(found, ast.ClassDef) else []
    for node, following in zip(nodes, [*nodes[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = [title[1] for title in titles[: node.lineno] if title]
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    pass
                case _:
                    text = ""
            yield node.target.id, above[-1] if above else "task", " ".join(text.split())


def _usage(name: str, kind: Any) -> str:
    """An option and its kind of value.

    >>> _usage("seed", int), _usage("resume", bool), _usage("clip_low", float | None)
    ('--seed INT', '--[no-]resume', '--clip-low FLOAT')
    """
    if kind is bool:
        return option(name).replace("--", "--[no-]", 1)
    return f"{option(name)} {_value(kind)}"


def _value(kind: Any) -> str:
    """The kind of a value.

    >>> _value(tuple[int, ...]), _value(typing.Literal["a", "b"])
    ('INT ...', '{a,b}')
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _value(parts[0])
    if origin is typing.Literal:
        return "{" + ",".join(str(x) for x in parts) + "}"
    if origin is tuple:
        return " ".join("..." if part is Ellipsis else _value(part) for part in parts)
    return "TEXT" if kind is str else kind.__name__.upper()


def _complete(name: str, text: str, default: Any) -> str:
    """The help of an option, its choices, and its default unless that is nothing."""
    if name in TABLES:
        text = f"{text}: {', '.join(TABLES[name])}"
    if default in ("", ()) or (default is None and "None" not in text):
        return text
    if isinstance(default, bool):
        default = "yes" if default else "no"
    words = " ".join(str(x) for x in default) if isinstance(default, tuple) else default
    return f"{text} (default: {words})"


def _lines(usage: str, text: str) -> list[str]:
    """A row of the help, wrapped to the terminal's width."""
    width = min(shutil.get_terminal_size((88, 24)).columns, 100)
    wrapped = textwrap.wrap(text, max(width - 28, 30), break_on_hyphens=False)
    if len(usage) > 24:
        return [f"  {usage}", *(" " * 28 + line for line in wrapped)]
    first, *rest = wrapped or [""]
    return [f"  {usage:26}{first}".rstrip(), *(" " * 28 + line for line in rest)]
