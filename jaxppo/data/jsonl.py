"""Read JSON lines (https://jsonlines.org), one bounded line at a time."""

import gzip
import io
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from jaxppo.data import textfile
from jaxppo.errors import UserError

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
    check: Callable[[dict], str] = lambda row: "",
) -> Iterator[tuple[int, dict]]:
    """Yield each object with its line number, from 1; read names in .gz with gzip.

    Blank lines and a byte order mark are skipped; lines end in any way. JSON is read
    strictly (RFC 8259): no NaN or Infinity, no number that float64 cannot hold, no key
    twice, no half of a surrogate pair.

    Args:
        errors: "strict" stops at the first bad line; "skip" skips bad lines and warns.
        max_bad: most bad lines that "skip" allows.
        max_line, max_bytes: most bytes in a line, and in the decompressed file.
        strings: keys that each object must have, with a string that is not blank.
        check: says what is wrong with an object, or "".

    Raises UserError with the line's number for a bad line, and for a file that cannot
    be read, has more than `max_bytes`, is damaged gzip, or has no objects.
    """
    path, bad, first, found = Path(path), 0, "", False
    if errors not in ("strict", "skip"):
        raise UserError(f"errors={errors!r}: choose one of strict, skip")
    for number, raw in _lines(path, max_line, max_bytes):
        try:
            row = _parse(raw, number, max_line, strings)
            if row is not None and (problem := check(row)):
                raise _BadLine(problem)
        except _BadLine as error:
            bad, first = bad + 1, first or f"line {number}: {error}"
            if errors == "skip" and bad <= max_bad:
                continue
            limit = f"; that is bad line {bad}, and {max_bad} may be skipped"
            limit = limit if errors == "skip" else ""
            raise UserError(f"{path}, line {number}: {error}{limit}") from None
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
    """Yield each line with its number; max_line + 1 bytes of one that is too long."""
    number, total, starts = 0, 0, True
    try:
        with (
            gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as binary,
            # lines may end in any way; latin-1 keeps all bytes
            io.TextIOWrapper(binary, "latin-1") as file,  # pyright: ignore[reportArgumentType]
        ):
            while raw := file.readline(max_line + 1).encode("latin-1"):
                total += len(raw)
                number += starts
                if total > max_bytes:
                    raise UserError(
                        f"{path}, line {number}: more than {max_bytes} bytes so far; split the file"
                    )
                if starts:
                    yield number, raw
                starts = raw.endswith(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is not a whole gzip file ({error}, after {total} bytes of text); make it again"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(raw: bytes, number: int, max_line: int, strings: Sequence[str]) -> dict | None:
    """Return the object of one line, or None for a blank one."""
    if number == 1 and raw.startswith(textfile.LFS):
        raise _BadLine(f"the file is {textfile.LFS_CURE}")
    if len(raw) > max_line and not raw.endswith(b"\n"):
        raise _BadLine(f"longer than {max_line} bytes; shorten it, or give one JSON object a line")
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip(SPACE)
        if not line:
            return None
        row = json.loads(line, object_pairs_hook=_unique_keys)
        # writing it finds NaN, infinity and halves of surrogate pairs
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeDecodeError:
        raise _BadLine("not UTF-8; save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise _BadLine("half of a surrogate pair (\\ud800 to \\udfff); write both halves") from None
    except json.JSONDecodeError as error:
        raise _BadLine(
            f"not JSON ({error.msg} at column {error.colno}); each line must be one JSON object"
        ) from None
    except RecursionError:
        raise _BadLine("nested too deeply; flatten it") from None
    except _BadLine:
        raise
    except ValueError:  # of `dumps`, or of `int` for more than 4300 digits
        raise _BadLine(
            "a number that is NaN, infinite, beyond float64 or has over 4300 digits; "
            "write null or a string"
        ) from None
    if not isinstance(row, dict):
        example = strings[0] if strings else "key"
        raise _BadLine(f'{type(row).__name__}, not an object; write {{"{example}": "..."}}')
    for key in strings:
        if key not in row:
            keys = ", ".join(_short(name) for name in list(row)[:5]) + ", ..." * (len(row) > 5)
            raise _BadLine(f"no {key!r} among its keys ({keys or 'none'})")
        if not isinstance(row[key], str):
            raise _BadLine(f"{key!r} is {type(row[key]).__name__}, not a string")
        if not row[key].strip():
            raise _BadLine(f"{key!r} is empty")
    return row


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    row = {}
    for key, value in pairs:
        if key in row:
            raise _BadLine(f"the key {_short(key)} twice in one object; remove one")
        row[key] = value
    return row


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:40] + "...")
