"""Each bound of a GGUF file, at the limit and one beyond."""

import struct

import pytest

from jaxppo.pretrained.gguf import MAX_TENSORS, MAX_VALUES, check

SIZES = {0: (1, 4), 8: (32, 34)}  # float32, and Q8_0: 32 numbers in 34 bytes


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def field(kind: int, value: bytes) -> bytes:
    return string(b"name") + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return field(9, struct.pack("<IQ", kind, count) + values)


def tensor(*shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return string(b"t") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(*, fields=(), tensors=(), data=b"", counts=None, magic=b"GGUF", version=3) -> bytes:
    counts = (len(tensors), len(fields)) if counts is None else counts
    return magic + struct.pack("<IQQ", version, *counts) + b"".join([*fields, *tensors]) + data


SOUND = [
    gguf(),
    gguf(version=2, fields=[field(4, bytes(4)), field(8, string(b"text")), field(7, b"\1")]),
    gguf(fields=[array(0, 3, b"abc"), array(8, 2, string(b"a") + string(b"")), array(4, 0)]),
    gguf(fields=[array(0, MAX_VALUES, bytes(MAX_VALUES))]),
    gguf(tensors=[tensor(2, 3), tensor(1, 1, 1, 1, offset=24)], data=bytes(28)),
    gguf(tensors=[tensor(32, 2, kind=8, offset=4)], data=bytes(4 + 68)),
]


@pytest.mark.parametrize("i", range(len(SOUND)))
def test_sound_files(tmp_path, i):
    (tmp_path / "x").write_bytes(SOUND[i])
    check(tmp_path / "x", SIZES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (gguf(magic=b"GGML"), "does not begin with GGUF"),
        (gguf()[:-1], "requires a buffer"),
        (gguf(version=1), "version is 1"),
        (gguf(version=3 << 24), "version is 50331648"),  # the other byte order
        (gguf(counts=(MAX_TENSORS + 1, 0)), "counts 65537 tensors"),
        (gguf(counts=(0, 2**64 - 1)), "18446744073709551615 settings"),
        (gguf(counts=(1, 0)), "requires a buffer"),
        (
            gguf(fields=[string(b"name", 2**64 - 1)]),
            "ends at byte 18446744073709551647",
        ),  # 24 + 8 + 2^64 - 1
        (gguf(fields=[field(13, bytes(8))]), "13"),
        (gguf(fields=[field(4, bytes(3))]), "ends at byte 44 of 43"),  # 24 + 12 (name) + 4 + 4
        (gguf(fields=[field(8, string(b"text", 5))]), "ends at byte 53 of 52"),
        (gguf(fields=[array(0, 4, b"abc")]), "ends at byte 56 of 55"),  # 24 + 12 + 4 + 12 + 4
        (gguf(fields=[array(0, 2**63)]), "arrays have 9223372036854775808 values"),
        (
            gguf(fields=[array(0, MAX_VALUES, bytes(MAX_VALUES)), array(0, 1, b"a")]),
            "arrays have 8388609 values",
        ),
        (gguf(fields=[array(8, 2, string(b"a"))]), "requires a buffer"),
        (gguf(fields=[array(9, 1, struct.pack("<IQ", 0, 0))]), "9"),
        (gguf(tensors=[tensor()]), "has 0 dimensions"),
        (gguf(tensors=[tensor(1, 1, 1, 1, 1)], data=bytes(4)), "has 5 dimensions"),
        (gguf(tensors=[tensor(2, 0)], data=bytes(8)), "shape .2, 0."),
        (
            gguf(tensors=[tensor(16, 2, kind=8)], data=bytes(34)),
            "shape .16, 2. in blocks of 32",
        ),  # a block in two rows
        (gguf(tensors=[tensor(1, kind=99)], data=bytes(4)), "99"),
        (
            gguf(tensors=[tensor(2, 3)], data=bytes(23)),
            "need 24 bytes after the header, but 23 are there",
        ),
        (gguf(tensors=[tensor(1, offset=1)], data=bytes(4)), "need 5 bytes"),
        (
            gguf(tensors=[tensor(2**32, 2**32)], data=bytes(4)),
            "need 73786976294838206464 bytes",
        ),  # 0 in 64 bits
        (
            gguf(tensors=[tensor(1), tensor(1)], data=bytes(7)),
            "need 8 bytes",
        ),  # both at the same place
    ],
)
def test_out_of_bounds(tmp_path, data, message):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises((ValueError, KeyError, struct.error), match=message):
        check(tmp_path / "x", SIZES)
