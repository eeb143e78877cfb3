"""The bounds of a GGUF file, checked before anything is allocated.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path

STRING, ARRAY = 8, 9
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the other types of metadata
MAX_VALUES = 2**23  # in all of a file's arrays; a vocabulary of 256 thousand tokens with its merges has about 1.5 million
MAX_TENSORS = 2**16
MAX_DIMS = 4


def check(path: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
    """Walk the header, before anything is allocated: every count, length and offset lies within the file.

    The library checks none of them: past the end of the file it reads empty values, as many as a count of 64 bits says.

    Args:
        path: a GGUF file.
        sizes: (elements, bytes) of a block of each tensor type.

    Raises:
        ValueError, struct.error, KeyError: for what is out of bounds, or of an unknown type.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, fields = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        if tensors > MAX_TENSORS or fields > MAX_TENSORS:
            raise ValueError(f"its header counts {tensors} tensors and {fields} settings; at most {MAX_TENSORS} are read")
        at, values = 24, 0
        for _ in range(fields):
            at = _past_string(data, at)
            at, values = _past_value(data, at, values)
        _check_tensors(data, at, tensors, sizes)


def _past_string(data: mmap.mmap, at: int) -> int:
    """Where a string that starts at a place ends."""
    return _within(data, at + 8 + struct.unpack_from("<Q", data, at)[0])


def _past_value(data: mmap.mmap, at: int, values: int) -> tuple[int, int]:
    """Where a setting ends, and how many values the arrays up to there have."""
    kind = struct.unpack_from("<I", data, at)[0]
    if kind == STRING:
        return _past_string(data, at + 4), values
    if kind != ARRAY:
        return _within(data, at + 4 + BYTES[kind]), values
    kind, count = struct.unpack_from("<IQ", data, at + 4)
    at, values = at + 16, values + count
    if values > MAX_VALUES:
        raise ValueError(f"its arrays have {values} values; at most {MAX_VALUES} are read")
    if kind != STRING:
        return _within(data, at + count * BYTES[kind]), values  # arrays of arrays are not in use
    for _ in range(count):
        at = _past_string(data, at)
    return at, values


def _within(data: mmap.mmap, at: int) -> int:
    if at > len(data):
        raise ValueError(f"a part of its header ends at byte {at} of {len(data)}")
    return at


def _check_tensors(data: mmap.mmap, at: int, count: int, sizes: Mapping[int, tuple[int, int]]) -> None:
    ends, total = 0, 0
    for _ in range(count):
        at = _past_string(data, at)
        dims = struct.unpack_from("<I", data, at)[0]
        if not 1 <= dims <= MAX_DIMS:
            raise ValueError(f"a tensor has {dims} dimensions; 1 to {MAX_DIMS} are possible")
        *shape, kind, offset = struct.unpack_from(f"<{dims}QIQ", data, at + 4)
        at += 16 + 8 * dims
        elements, size = sizes[kind]
        if min(shape) < 1 or shape[0] % elements:
            raise ValueError(f"a tensor has the shape {shape} in blocks of {elements}")
        length = math.prod(shape) // elements * size
        ends, total = max(ends, offset + length), total + length
    # The sum, too: thousands of tensors that all point at the same bytes would each become an array.
    if max(at + ends, at + total) > len(data):
        raise ValueError(f"its tensors need {max(ends, total)} bytes after the header, but {len(data) - at} are there")
