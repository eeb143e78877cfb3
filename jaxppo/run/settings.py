"""Read and write settings: a run's config.json, and YAML or JSON files for --config."""

import dataclasses
import json
import math
import re
import types
import typing
from collections import Counter
from pathlib import Path, PurePath
from typing import Any, TypeVar

import yaml

from jaxppo.config import HIDDEN, Config
from jaxppo.data import textfile
from jaxppo.errors import UserError, first_line
from jaxppo.presets import ALGORITHMS, preset
from jaxppo.run import option_names

C = TypeVar("C", bound=Config)

MAX_BYTES = 100_000  # of a file; all settings with comments are a tenth of it
# numbers in text; thousands may be grouped, as in 1_000
INTEGER = re.compile(r"[-+]?(\d+|\d{1,3}(_\d{3})+)")
NUMBER = re.compile(
    rf"{INTEGER.pattern}|[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?|[-+]?\.?(inf|Infinity)"
)
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def to_dict(config) -> dict:
    """The settings as JSON values: paths become strings, and tuples lists."""
    return {name: _plain(x) for name, x in dataclasses.asdict(config).items()}


def read_config(kind: type[C], path: Path) -> C:
    """Read a run's config.json as settings of class `kind`; names that it does not have
    are ignored. Raises UserError.
    """
    return from_dict(kind, _parse(path), source=path)


def checked_settings(kind: type, given: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Settings from Python with their types; one text stands for a list of texts.
    Raises UserError for a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    plain = {}
    for name, x in given.items():
        if isinstance(x, str) and hints[name] == tuple[str, ...]:
            x = [x]
        plain[name] = _plain(x)
    return _convert_known(kind, plain, source)


def _plain(x: Any) -> Any:
    """Tuples as lists, NumPy numbers as Python's, paths as text."""
    if isinstance(x, tuple | list):
        return [_plain(y) for y in x]
    if isinstance(x, PurePath):
        return str(x)
    return x.item() if hasattr(x, "item") and getattr(x, "ndim", None) == 0 else x


def from_dict(kind: type[C], stored: dict[str, Any], *, source: str | Path) -> C:
    """The inverse of `to_dict`. Ignores unknown names; raises UserError, which names
    the source, for a value of the wrong type.
    """
    return dataclasses.replace(kind(), **_convert_known(kind, stored, source))


def base_settings(
    kind: type[Config], path: Path | None, algorithm: str | None
) -> tuple[Config, list[str]]:
    """The settings that options of the command line override, and remarks for the user.

    They are the defaults, overridden by the algorithm's preset, overridden by the file
    of --config. `algorithm` is the command line's, and overrides the file's.

    Raises UserError if something is wrong with the file; also if it sets all that the
    preset of `algorithm` sets, so that the preset would have no effect.
    """
    stored, remarks = ({}, []) if path is None else read_config_file(kind, path)
    in_file = stored.pop("algorithm", None)
    chosen = algorithm or in_file
    if chosen is None:
        return dataclasses.replace(kind(), **stored), remarks
    if not algorithm and in_file not in ALGORITHMS:
        raise UserError(
            f"{path}: algorithm is {in_file[:40]!r}; choose one of {', '.join(ALGORITHMS)}"
        )
    settings = preset(kind(), chosen)
    own = ALGORITHMS[chosen].settings
    if algorithm and in_file not in (None, algorithm) and own.keys() <= stored.keys():
        raise UserError(
            f"--algorithm {algorithm} would change nothing: {path} is of algorithm {in_file} and "
            f"sets {', '.join(own)} itself; remove them from the file"
        )
    return dataclasses.replace(settings, **stored), remarks


def read_config_file(kind: type[Config], path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings in a file of --config, and remarks on what was left out. Raises
    UserError, also for unknown names.
    """
    stored = _parse(path)
    hidden = [name for name, x in stored.items() if x == HIDDEN]
    remarks = [f"{path}: {name} is hidden there, and keeps its default" for name in hidden]
    stored = {name: x for name, x in stored.items() if name not in hidden}
    is_record = path.suffix == ".json"
    if is_record:
        stored.pop("resume", None)  # how that run was last started
    # `plan` has a field `config`, which names a file too
    names = {field.name for field in dataclasses.fields(kind)} - {"config"}
    if is_record and "record" in names:  # `plan` takes that of any script
        stored = {name: x for name, x in stored.items() if name in names} | {"record": str(path)}
    if unknown := [name for name in stored if name not in names]:
        words = [_with_nearest(name, names) for name in unknown[:5]]
        words += ["..."] * (len(unknown) > 5)
        cure = (
            "a run's config.json goes with the script that wrote it"
            if is_record
            else "--help-all lists all settings"
        )
        plural = "s" * (len(unknown) > 1)
        raise UserError(f"{path}: unknown setting{plural} {', '.join(words)}; {cure}")
    return _convert_known(kind, stored, path), remarks


def convert(value: Any, kind: Any) -> Any:
    """Convert a value of JSON or YAML to a setting's type. Raises TypeError.

    >>> convert([["tau", 1]], tuple[tuple[str, float], ...])
    (('tau', 1.0),)
    >>> convert("1e-4", float | None), convert("1_000", int), convert("a", Path)
    (0.0001, 1000, PosixPath('a'))
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for part in parts:
            try:
                return convert(value, part)
            except TypeError:
                pass
    elif origin is tuple and isinstance(value, list):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            return tuple(convert(x, part) for x, part in zip(value, kinds, strict=True))
    elif origin is typing.Literal:
        if any(value == part and type(value) is type(part) for part in parts):
            return value
    elif kind is float:
        is_text = isinstance(value, str) and NUMBER.fullmatch(value)
        if (type(value) in (int, float) or is_text) and not math.isnan(number := _float(value)):
            return number
    elif kind is int and isinstance(value, str):
        if INTEGER.fullmatch(value):
            return int(value)
    elif kind is bool and isinstance(value, str):
        if value.lower() in WORDS:
            return WORDS[value.lower()]
    elif kind is types.NoneType and isinstance(value, str):
        if value.lower() in ("", "~", "null"):
            return None
    elif origin is None and issubclass(kind, PurePath):
        if isinstance(value, str):
            return kind(value)
    elif origin is None and type(value) is kind:
        return value
    raise TypeError


def _float(value: int | float | str) -> float:
    """NaN for an integer that is too large."""
    try:
        return float(value.replace(".inf", "inf") if isinstance(value, str) else value)
    except OverflowError:
        return math.nan


def _convert_known(kind: type, stored: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The values of the settings that `kind` has, with their types. Raises
    UserError.
    """
    hints = typing.get_type_hints(kind)
    known = {}
    for field in dataclasses.fields(kind):
        if field.name in stored:
            try:
                known[field.name] = convert(stored[field.name], hints[field.name])
            except TypeError:
                words = _type_error(field.name, stored[field.name], hints[field.name], source)
                raise UserError(words) from None
    return known


def _type_error(name: str, value: Any, kind: Any, source: str | Path) -> str:
    shown = {dict: "a mapping", list: "a list"}.get(type(value)) or repr(value)[:40]
    if typing.get_origin(kind) is typing.Literal:
        expected = f"one of {', '.join(typing.get_args(kind))}"
    elif isinstance(kind, type) and not typing.get_args(kind):
        expected = kind.__name__
    else:
        expected = str(kind)
    return f"{source}: {name} is {shown}, but must be {expected}"


def _with_nearest(name: Any, names: set[str]) -> str:
    meant = option_names.suggest(str(name), names)
    return f"{str(name)[:40]!r}" + (f" ({meant})" if meant else "")


def _parse(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file, unchecked. Raises UserError."""
    text = textfile.read(path, max_bytes=MAX_BYTES, what="settings file")
    if path.suffix == ".json":
        stored, example = _parse_json(path, text), '{"lr": 0.001}'
    else:
        stored, example = _parse_yaml(path, text), "lr: 0.001"
    if not isinstance(stored, dict):
        found = "nothing" if stored is None else type(stored).__name__
        raise UserError(f"{path} holds {found}, not settings such as {example}")
    return stored


def _parse_json(path: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, times in Counter(name for name, _ in pairs).items():
            if times > 1:
                raise UserError(f"{path}: {name[:40]!r} is given twice; keep one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({str(error)[:100]})") from None


def _parse_yaml(path: Path, text: str) -> Any:
    """The values as text, lists and mappings: YAML 1.1 reads 012 as 10, off as false.
    Aliases, with which a small text can become huge, are refused; so are names that are
    given twice.
    """
    try:
        # composing fails at once on deep nesting, and does not expand aliases
        loader = yaml.BaseLoader(text)
        root, seen = loader.get_single_node(), set()
        for key, _ in root.value if isinstance(root, yaml.MappingNode) else []:
            if str(key.value) in seen:
                line = key.start_mark.line + 1
                raise UserError(f"{path}, line {line}: {key.value[:40]!r} is given twice; keep one")
            seen.add(str(key.value))
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):
                line, name = token.start_mark.line + 1, token.value[:40]
                raise UserError(f"{path}, line {line}: an alias (*{name}); write its value out")
        return None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML ({first_line(error)})") from None
