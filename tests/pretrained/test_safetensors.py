"""Checkpoint folders in one file or in shards; damaged or hostile ones give one line."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxppo.errors import PretrainedError
from jaxppo.pretrained.safetensors import INDEX, SINGLE, read_folder, write_file


def shards(folder, weight_map, **files):
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_single_file_in_every_float(tmp_path):
    values = np.asarray([[1.5, -2.0]])
    kinds = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    save_file({name: values.astype(kind) for name, kind in kinds.items()}, tmp_path / SINGLE)
    tensors = read_folder(tmp_path)
    assert set(tensors) == set(kinds)
    assert all(
        tensor.dtype == np.float32 and (tensor == values).all() for tensor in tensors.values()
    )


def test_write_and_read(tmp_path):
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T  # not contiguous
    write_file(tmp_path / SINGLE, {"a": transposed})
    assert read_folder(tmp_path)["a"].tolist() == transposed.tolist()


def test_shards(tmp_path):
    a, b = np.ones((2, 2), np.float32), np.zeros(3, np.float32)
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one={"a": a}, two={"b": b})
    tensors = read_folder(tmp_path)
    assert tensors["a"].tolist() == a.tolist() and tensors["b"].tolist() == b.tolist()


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "a\\x.safetensors", "x.bin"],
)
def test_shards_stay_in_the_folder(tmp_path, file):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "x.safetensors")
    shards(folder, {"a": file})
    with pytest.raises(PretrainedError, match="not a file of its own folder"):
        read_folder(folder)


def test_incomplete_shards(tmp_path):
    shards(
        tmp_path,
        {"a": "one.safetensors", "b": "two.safetensors"},
        one={"a": np.ones(1, np.float32)},
    )
    with pytest.raises(PretrainedError, match=r"lacks two.safetensors"):
        read_folder(tmp_path)
    shards(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(PretrainedError, match="lacks 'b'"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_bad_index(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(PretrainedError, match="no weight_map"):
        read_folder(tmp_path)


def test_no_files(tmp_path):
    with pytest.raises(PretrainedError, match=r"no model.safetensors"):
        read_folder(tmp_path)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        header(b"{}", 2**63),  # a header of 8 exabytes
        header(b"{}", 2**27),  # a header larger than any real one
        header(b"not json"),
        header(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        ),  # promises 8 bytes, has none
        header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}')
        + bytes(4),  # shape and bytes disagree
    ],
)
def test_damaged_files(tmp_path, data):
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(PretrainedError, match="not a whole safetensors file"):
        read_folder(tmp_path)


def test_quantised(tmp_path):
    save_file({"a": np.ones(2, np.int8)}, tmp_path / SINGLE)
    with pytest.raises(PretrainedError, match="stored as I8"):
        read_folder(tmp_path)
