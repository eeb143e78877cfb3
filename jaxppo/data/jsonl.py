"""JSON lines (https://jsonlines.org), read one bounded line at a time: a file of any
size, from anyone.
"""

import gzip
import json
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

from jaxppo.errors import UserError

# of an integer: Python's own default, held whatever the interpreter is set to (int() is
# quadratic)
MAX_DIGITS = 4300
SPACE = " \t\r\n"  # JSON's white space


class _BadLine(ValueError):
    """What is wrong with one line."""


def read(
    path: str | Path,
    *,
    errors: Literal["strict", "skip"] = "strict",
    max_bad: int = 10,
    max_line: int = 2**20,
    max_bytes: int = 2**34,
    strings: Sequence[str] = (),
) -> Iterator[tuple[int, dict]]:
    """The objects of a file of JSON lines, each with the number of its line (from 1).

    Blank lines, a byte order mark at the start of the file and Windows' line ends are
    passed over. JSON is taken strictly (RFC 8259): no NaN or Infinity, no number that
    float64 cannot hold, no key twice, no half of a surrogate pair.

    Args:
        path: a text file in UTF-8; with the suffix .gz it is decompressed on the way.
        errors: "strict" stops at the first bad line; "skip" passes over bad lines and
        tells their count in a warning. max_bad: most bad lines that "skip" passes over.
        max_line: most bytes in a line, its "\\n" not counted; not more than max_line +
        1 bytes of a line are ever held. max_bytes: most bytes in the file, after
        decompression. strings: keys that each object must have, with a string that is
        not blank.

    Raises:
        UserError: for the first bad line, with its number, or the first after max_bad
        of them; also, in either mode, for a
            file that cannot be read, is larger than max_bytes, is damaged gzip, or has
            no objects.
    """
    path, bad, first, found = Path(path), 0, "", False
    if errors not in ("strict", "skip"):
        raise UserError(f"errors={errors!r}: choose one of strict, skip")
    for number, raw in _lines(path, max_line, max_bytes):
        try:
            row = _parse(raw, number, max_line, strings)
        except _BadLine as error:
            bad, first = bad + 1, first or f"line {number}: {error}"
            if errors == "strict":
                raise UserError(f"{path}, line {number}: {error}") from None
            if bad > max_bad:
                raise UserError(
                    f"{path}, line {number}: {error}; that is bad line {bad}, and {max_bad} may be skipped"
                ) from None
            continue
        if row is not None:
            found = True
            yield number, row
    if not found:
        example = ", ".join(f'"{key}": "..."' for key in strings) or '"key": "value"'
        skipped = f" among its lines ({bad} bad; {first})" if bad else ""
        raise UserError(
            f"{path} has no objects{skipped}; give one JSON object a line, such as {{{example}}}"
        )
    if bad:
        warnings.warn(
            f"{path}: skipped {bad} bad line{'s' * (bad > 1)}; the first is {first}", stacklevel=2
        )


def _lines(path: Path, max_line: int, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Each line with its number; of one that is too long, its first max_line + 1
    bytes.
    """
    total = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            for raw, starts in _pieces(file, max_line + 1):  # type: ignore[arg-type]
                total += len(raw)
                if total > max_bytes:
                    raise UserError(
                        f"{path}, line {number + starts}: more than {max_bytes} bytes to here; split the file"
                    )
                if starts:
                    number += 1
                    yield number, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is not a whole gzip file ({error}, after {total} bytes of text); make it again"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _pieces(file: BinaryIO, size: int) -> Iterator[tuple[bytes, bool]]:
    """Pieces of at most `size` bytes, and whether each starts a line."""
    starts = True
    while raw := file.readline(size):
        yield raw, starts
        starts = raw.endswith(b"\n")


def _parse(raw: bytes, number: int, max_line: int, strings: Sequence[str]) -> dict | None:
    """The object of one line; None for a blank one."""
    if len(raw) > max_line and not raw.endswith(b"\n"):
        raise _BadLine(f"longer than {max_line} bytes; shorten it, or give one JSON object a line")
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip(SPACE)
        if not line:
            return None
        row = json.loads(
            line,
            object_pairs_hook=_once,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
        # only an escape can bring half of a pair past the decoder above
        if "\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise _BadLine("not UTF-8; save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise _BadLine(
            "an escape \\ud800 to \\udfff that is half of a surrogate pair; write both halves or neither"
        ) from None
    except json.JSONDecodeError as error:
        raise _BadLine(
            f"not JSON ({error.msg} at column {error.colno}); each line must be one JSON object"
        ) from None
    except RecursionError:
        raise _BadLine("not JSON that can be read (nested too deeply); flatten it") from None
    if not isinstance(row, dict):
        raise _BadLine(
            f'{type(row).__name__}, not an object; write {{"{strings[0] if strings else "key"}": "..."}}'
        )
    for key in strings:
        _check_string(row, key)
    return row


def _check_string(row: dict, key: str) -> None:
    if key not in row:
        keys = ", ".join(_short(name) for name in list(row)[:5]) + (", ..." if len(row) > 5 else "")
        raise _BadLine(f"no {key!r} among its keys ({keys or 'none'})")
    if not isinstance(row[key], str):
        raise _BadLine(f"{key!r} is {type(row[key]).__name__}, not a string")
    if not row[key].strip():
        raise _BadLine(f"{key!r} is empty")


def _once(pairs: list[tuple[str, object]]) -> dict:
    row = {}
    for key, value in pairs:
        if key in row:
            raise _BadLine(f"the key {_short(key)} twice in one object; remove one")
        row[key] = value
    return row


def _constant(name: str) -> NoReturn:
    raise _BadLine(f"{name} is not JSON; leave the value out or write null")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _BadLine(f"the number {text[:20]} does not fit a float64; write it as a string")
    return value


def _int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise _BadLine(f"an integer of more than {MAX_DIGITS} digits; write it as a string")
    return int(text)


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:40] + "...")
