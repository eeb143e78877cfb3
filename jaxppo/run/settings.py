"""Settings from a file, for --config: YAML, or the config.json of a run. Nothing in it
is run, and nothing is passed over.
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from jaxppo.config import HIDDEN, Config
from jaxppo.errors import UserError
from jaxppo.presets import ALGORITHMS, preset

LARGEST = 100_000  # bytes; every setting with a comment is a tenth of it
DEEPEST = 4  # a mapping of lists of pairs has 3
NUMBER = re.compile(
    r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+|[-+]?(inf|Infinity)"
)  # numbers that YAML takes for text: 1e-4


def base(kind: type[Config], path: Path | None, algorithm: str | None) -> tuple[Config, list[str]]:
    """(what stands below the options of the command line, remarks): the defaults, over
    them the settings of the algorithm, over them those of the file. `algorithm` is the
    command line's, which goes before the file's.

    Raises UserError, one line, for whatever is wrong with the file; and where the
    algorithm would be a mere name, because the file of another one sets everything that
    it consists of.
    """
    stored, remarks = ({}, []) if path is None else read(kind, path)
    named = algorithm or stored.get("algorithm")
    if not algorithm and named not in (None, *ALGORITHMS):
        raise UserError(
            f"{path}: algorithm is {named[:40]!r}; choose one of {', '.join(ALGORITHMS)}"
        )
    settings = kind() if named is None else preset(kind(), named)
    theirs = stored.pop("algorithm", named)
    if algorithm and theirs != algorithm and ALGORITHMS[algorithm].settings.keys() <= stored.keys():
        raise UserError(
            f"--algorithm {algorithm} would change nothing: {path} is of algorithm {theirs} and sets "
            f"{', '.join(ALGORITHMS[algorithm].settings)} itself; take them out of the file"
        )
    return dataclasses.replace(settings, **stored), remarks


def read(kind: type[Config], path: Path) -> tuple[dict[str, Any], list[str]]:
    """(the settings of a file, each with its own type; remarks on what was left out).
    Raises UserError, one line.
    """
    text = _text(path)
    stored = _json(path, text) if path.suffix == ".json" else _yaml(path, text)
    stored, hidden = _split(stored, lambda name, x: x != HIDDEN)
    if path.suffix == ".json":
        # how that run was last started is no setting of another one
        stored.pop("resume", None)
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)} - {
        "config"
    }  # of `plan`, where it names a file, too
    stored, unknown = _split(stored, lambda name, x: name in names)
    if unknown:
        words = [_nearest(name, names) for name in list(unknown)[:5]] + ["..."] * (len(unknown) > 5)
        cure = (
            "a run's config.json goes with the script that wrote it"
            if path.suffix == ".json"
            else "--help lists all settings"
        )
        raise UserError(
            f"{path}: unknown setting{'s' * (len(unknown) > 1)} {', '.join(words)}; {cure}"
        )
    remarks = [f"{path}: {name} is hidden there, and stays as it is by default" for name in hidden]
    return {name: _checked(path, name, x, hints[name]) for name, x in stored.items()}, remarks


def typed(value: Any, kind: Any) -> Any:
    """A value of JSON or YAML as one of a setting's type. Raises TypeError where it is
    none.

    >>> (
    ...     typed([["tau", 1]], tuple[tuple[str, float], ...]),
    ...     typed("1e-4", float | None),
    ...     typed("a", Path),
    ... )
    ((('tau', 1.0),), 0.0001, PosixPath('a'))
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for part in parts:
            try:
                return typed(value, part)
            except TypeError:
                pass
    elif origin is tuple and isinstance(value, list):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            return tuple(typed(x, part) for x, part in zip(value, kinds, strict=True))
    elif origin is typing.Literal:
        if any(value == part and type(value) is type(part) for part in parts):
            return value
    elif kind is float:
        if (
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308
        ) or value in _ENDLESS:
            return float(value)
        if isinstance(value, str) and NUMBER.fullmatch(value):
            return float(value)
    elif origin is None and issubclass(kind, PurePath):
        if isinstance(value, str):
            return kind(value)
    elif origin is None and type(value) is kind:
        return value
    raise TypeError


_ENDLESS = (float("inf"), -float("inf"))


def _checked(path: Path, name: str, value: Any, kind: Any) -> Any:
    try:
        return typed(value, kind)
    except TypeError:
        pass
    words = (
        kind.__name__
        if isinstance(kind, type) and not typing.get_args(kind)
        else str(kind).replace("typing.", "")
    )
    if typing.get_origin(kind) is typing.Literal:
        words = f"one of {', '.join(typing.get_args(kind))}"
    shown = {dict: "a mapping", list: "a list"}.get(type(value)) or repr(value)[:40]
    quoted = kind is str and not isinstance(value, dict | list | str | None)
    cure = (
        f"; write it in quotes where text is meant: {name}: '...'"
        if quoted and path.suffix != ".json"
        else ""
    )
    raise UserError(f"{path}: {name} is {shown}, but must be {words}{cure}")


def _split(stored: dict, wanted: Callable[[Any, Any], bool]) -> tuple[dict, dict]:
    return {k: x for k, x in stored.items() if wanted(k, x)}, {
        k: x for k, x in stored.items() if not wanted(k, x)
    }


def _nearest(name: Any, names: set[str]) -> str:
    close = difflib.get_close_matches(str(name), sorted(names), n=1)
    return f"{str(name)[:40]!r}" + (f" (perhaps you meant {close[0]})" if close else "")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"{path} has more than {LARGEST:,} bytes: it is no file of settings")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"--config {path} cannot be read ({error.strerror}); give a file of settings"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from None


def _json(path: Path, text: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, times in Counter(name for name, _ in pairs).items():
            if times > 1:
                raise UserError(f"{path}: {name[:40]!r} stands there twice; keep one")
        return dict(pairs)

    try:
        stored = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({str(error)[:100]})") from None
    if not isinstance(stored, dict):
        raise UserError(
            f'{path} holds {type(stored).__name__}, not settings; write {{"name": value}}'
        )
    return stored


def _yaml(path: Path, text: str) -> dict[str, Any]:
    """One flat mapping. What YAML can do beyond that (aliases, merges, tags, several
    documents) is refused.
    """
    import yaml

    try:
        _plain(path, yaml, text)
        stored = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(
            f"{path}{f', line {mark.line + 1}' if mark else ''}: no YAML ({error.problem})"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no YAML ({(str(error).splitlines() or [type(error).__name__])[0][:100]})"
        ) from None
    if stored is None:
        raise UserError(f"{path} is empty; write one setting a line, as in lr: 0.001")
    if not isinstance(stored, dict):
        raise UserError(
            f"{path} holds {type(stored).__name__}, not settings; write one a line, as in lr: 0.001"
        )
    return stored


def _plain(path: Path, yaml: Any, text: str) -> None:
    """Refuse, before anything is made of it, what a small text can blow up, and names
    that stand there twice.
    """
    depth, documents, seen, words = 0, 0, set(), 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"{path}, line {event.start_mark.line + 1}"
        documents += isinstance(event, yaml.DocumentStartEvent)
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{line}: an alias (*{event.anchor[:40]}); write its value out")
        if isinstance(event, yaml.NodeEvent) and depth == 1:
            name = event.value if isinstance(event, yaml.ScalarEvent) and words % 2 == 0 else None
            if name is not None and name in {"<<", *seen}:
                raise UserError(
                    f"{line}: {name[:40]!r} stands there twice or merges; keep one of each setting"
                )
            seen |= set() if name is None else {name}
            words += 1
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
            event, yaml.CollectionEndEvent
        )
        if depth > DEEPEST or documents > 1:
            raise UserError(
                f"{line}: {'another document' if documents > 1 else 'too deep'}; settings are one flat mapping"
            )


def to_dict(config) -> dict:
    """The settings as plain JSON values; paths become strings, tuples lists."""
    plain = lambda x: (
        str(x) if isinstance(x, PurePath) else [plain(y) for y in x] if isinstance(x, tuple) else x
    )
    return {name: plain(x) for name, x in dataclasses.asdict(config).items()}


def from_dict(kind: type, stored: dict):
    """The settings of `kind` among the values of `to_dict`; what it does not know is
    left out.
    """
    as_tuple = lambda x: tuple(as_tuple(y) for y in x) if isinstance(x, list) else x
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: as_tuple(x) for name, x in stored.items() if name in names})


def from_file(kind: type, path: Path):
    """`from_dict` of a config.json. Raises UserError when it is no such file, or a
    value has another type than its setting.
    """
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as settings ({str(error).splitlines()[0][:100]})"
        ) from None
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds {type(stored).__name__}, not an object of settings")
    known = kind()
    for field in dataclasses.fields(kind):
        if field.name in stored and not _same_kind(
            stored[field.name], getattr(known, field.name), str(field.type)
        ):
            name = field.name.replace("_", "-")
            raise UserError(f"{path}: --{name} is {stored[field.name]!r}, but must be {field.type}")
    return from_dict(kind, stored)


def _same_kind(value, default, annotation: str) -> bool:
    """Whether a JSON value can stand for a setting."""
    if value is None:
        return default is None or "None" in annotation
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, tuple):
        return isinstance(value, list)
    if isinstance(default, int):
        return isinstance(value, int)
    return (
        isinstance(value, int | float)
        if default is None or isinstance(default, float)
        else isinstance(value, str)
    )
