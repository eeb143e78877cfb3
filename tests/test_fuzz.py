"""Fuzzing of the readers of files: any bytes give a correct result or the reader's own one-line
error, in bounded time.
"""

import gzip
import json
import struct
import time
import warnings
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from jaxppo import pretrained
from jaxppo.config import RunConfig, validate_run
from jaxppo.data import jsonl
from jaxppo.errors import PretrainedError, UserError
from jaxppo.models.shapes import gpt2, llama
from jaxppo.pretrained import gguf as reader
from jaxppo.pretrained import mapping, safetensors
from jaxppo.run.settings import from_dict, to_dict

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
SECONDS = 5.0  # each example takes milliseconds; the second machine of a pair may be busy
fuzz = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def guarded(read, error: type[Exception]):
    """Return the result, or None after the documented error, which is one line; in bounded time."""
    start, result = time.monotonic(), None
    try:
        result = read()
    except error as found:
        assert "\n" not in str(found) and len(str(found)) < 2000
    assert time.monotonic() - start < SECONDS
    return result


@st.composite
def mutated(draw, whole: bytes, head: int):
    """A valid file with bytes changed, a 64-bit number written over it, or a piece removed or
    doubled, most often in its header.
    """
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(head, len(data)) - 1) | st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["byte", "number", "cut", "remove", "double"]))
        if kind == "byte":
            data[at] = draw(st.integers(0, 255))
        elif kind == "number":
            number = draw(
                st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
                | st.integers(0, 2**64 - 1)
            )
            data[at : at + 8] = struct.pack("<Q", number)
        elif kind == "cut":
            del data[at + 1 :]
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        if not data:
            break
    return bytes(data)


# JSON lines

LINES = (
    b'{"a": "x", "n": [1, 2.5e3, null, true]}\r\n\n'
    b'{"a": "\\ud83d\\ude42 \\u00fc", "b": {"c": {}}}\n{"a": ""}\n'
)


def lines_of(path: Path, mode: str) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return list(jsonl.read(path, errors=mode, max_line=1000, max_bytes=10_000))


@fuzz
@given(
    data=st.binary(max_size=300) | mutated(LINES, len(LINES)),
    mode=st.sampled_from(["strict", "skip"]),
)
def test_json_lines(tmp_path, data, mode):
    (tmp_path / "x.jsonl").write_bytes(data)
    rows = guarded(lambda: lines_of(tmp_path / "x.jsonl", mode), UserError)
    numbers = [number for number, _ in rows or []]
    assert numbers == sorted(set(numbers)) and all(
        1 <= number <= data.count(b"\n") + 1 for number in numbers
    )
    for number, row in rows or []:
        line = data.split(b"\n")[number - 1].decode("utf-8-sig")
        assert json.loads(line) == row and json.dumps(row, allow_nan=False)


@fuzz
@given(data=st.binary(max_size=100) | mutated(gzip.compress(LINES * 20, mtime=0), 20))
def test_json_lines_in_gzip(tmp_path, data):
    (tmp_path / "x.jsonl.gz").write_bytes(data)
    guarded(lambda: lines_of(tmp_path / "x.jsonl.gz", "skip"), UserError)


# settings

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
DEFAULTS = to_dict(RunConfig())
VALUES = {
    int: st.integers(-3, 300) | st.integers(),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=8) | st.sampled_from(["none", "ppo", "k1", "batch"]),
    bool: st.booleans(),
}
KINDS = {name: kind for name, kind in get_type_hints(RunConfig).items() if kind in VALUES}


def config_of(stored: dict) -> RunConfig:
    return from_dict(RunConfig, stored, source="config.json")


@pytest.mark.ci
@settings(fuzz, max_examples=100)
@given(
    stored=st.dictionaries(
        st.sampled_from(sorted(DEFAULTS)) | st.text(max_size=8), JSON, max_size=6
    )
)
def test_settings_of_any_value(stored):
    config = guarded(lambda: config_of(stored), UserError)
    if config is not None:
        found = to_dict(config)
        assert all(found[name] == x for name, x in DEFAULTS.items() if name not in stored)
        assert config_of(found) == config


@fuzz
@given(data=st.data(), names=st.lists(st.sampled_from(sorted(KINDS)), max_size=6, unique=True))
def test_settings_of_the_right_type(data, names):
    changes = {name: data.draw(VALUES[KINDS[name]], label=name) for name in names}
    config = config_of(DEFAULTS | changes)
    assert all(repr(getattr(config, name)) == repr(x) for name, x in changes.items())
    guarded(lambda: validate_run(config), UserError)


# safetensors

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "a": RANDOM.normal(size=(2, 3)).astype(np.float32),
    "b": RANDOM.normal(size=4).astype(np.float16),
    "c": np.ones((), np.float64),
}
SAFE = save(ARRAYS)
SAFE_HEAD = 8 + struct.unpack_from("<Q", SAFE)[0]


def packed(header: object, data: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F64", "F32", "F16", "BF16", "F8_E4M3", "I8", "BOOL", "U64", "X"]
        ),
        "shape": st.lists(
            st.integers(0, 4) | st.sampled_from([2**31, 2**62, 2**63, 2**64]), max_size=3
        ),
        "data_offsets": st.lists(
            st.integers(0, 32) | st.integers(0, 2**64), min_size=2, max_size=2
        ),
    }
)
HEADERS = st.builds(
    packed, st.dictionaries(st.text(max_size=3), ENTRY, max_size=2) | JSON, st.binary(max_size=32)
)


@fuzz
@given(data=st.binary(max_size=100) | mutated(SAFE, SAFE_HEAD) | HEADERS)
@example(
    packed({"a": {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}}, bytes(4))
)  # NumPy has 64 dimensions
@example(packed({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}))
@example(packed({"a": {"dtype": "F32", "shape": [2**63, 0, 2**63], "data_offsets": [0, 0]}}))
@example(packed('{"a":' * 10_000))
@example(packed({"a\n\nb": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}, bytes(1)))
@example(packed({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)))
def test_safetensors(tmp_path, data):
    (tmp_path / safetensors.SINGLE).write_bytes(data)
    tensors = guarded(lambda: safetensors.read_folder(tmp_path), PretrainedError)
    # Four bytes for what took two at least: nothing grows to more than twice the file.
    assert tensors is None or sum(tensor.nbytes for tensor in tensors.values()) <= 2 * len(data)
    assert tensors is None or all(tensor.dtype == np.float32 for tensor in tensors.values())


@fuzz
@given(
    data=st.binary(max_size=60)
    | mutated(b'{"weight_map": {"a": "model-1.safetensors"}}', 60)
    | JSON.map(json.dumps).map(str.encode)
)
def test_index_of_shards(tmp_path, data):
    (tmp_path / safetensors.INDEX).write_bytes(data)
    (tmp_path / "model-1.safetensors").write_bytes(SAFE)
    tensors = guarded(lambda: safetensors.read_folder(tmp_path), PretrainedError)
    assert tensors is None or set(tensors) <= set(ARRAYS)


# GGUF


def gguf_file(path: Path) -> bytes:
    """The smallest Llama: 4 tokens, width 32, 1 layer of 2 heads."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (
        ("block_count", 1),
        ("context_length", 16),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
    ):
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<|endoftext|>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        kind = gguf.GGMLQuantizationType.Q8_0
        stored = gguf.quants.quantize(np.eye(32, dtype=np.float32), kind)
        writer.add_tensor(f"blk.0.{part}.weight", stored, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return gguf_file(tmp_path_factory.mktemp("gguf") / "x.gguf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory, whole) -> tuple:
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    path.write_bytes(whole)
    return reader.read(path)


def load(path: Path):
    metadata, tensors, tokenizer = reader.read(path)
    config = reader.model_config(metadata, tensors)
    return mapping.from_checkpoint("llama", config, tensors), tokenizer.encode("abab")


def test_the_gguf_file_is_valid(tmp_path, whole):
    (tmp_path / "x.gguf").write_bytes(whole)
    params, ids = load(tmp_path / "x.gguf")
    assert params["layers_0"]["mlp"]["up"]["kernel"].shape == (32, 32) and ids == [3, 3]


@settings(fuzz, max_examples=400)
@given(data=st.data())
def test_gguf(tmp_path, whole, data):
    head = whole.index(b"token_embd.weight") + 60
    (tmp_path / "x.gguf").write_bytes(data.draw(st.binary(max_size=100) | mutated(whole, head)))
    guarded(lambda: load(tmp_path / "x.gguf"), PretrainedError)


def changed(whole: bytes, name: bytes, value: int) -> bytes:
    """The file with the 32-bit number under a name set to another."""
    at = whole.index(name) + len(name) + 4
    return whole[:at] + struct.pack("<I", value) + whole[at + 4 :]


@pytest.mark.parametrize("value", [0, 1, 3, 2**31, 2**32 - 1])
@pytest.mark.parametrize(
    "name",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
    ],
)
def test_gguf_settings(tmp_path, whole, name, value):
    (tmp_path / "x.gguf").write_bytes(changed(whole, f"llama.{name}".encode(), value))
    guarded(lambda: load(tmp_path / "x.gguf"), PretrainedError)


@pytest.mark.ci
@settings(fuzz, max_examples=200)
@given(data=st.data())
def test_gguf_settings_of_any_value(sound, data):
    # each setting missing, or of any type
    metadata = {
        name: x
        for name, x in sound[0].items()
        if not data.draw(st.booleans() | st.just(False), label=name)
    }
    names = st.sampled_from(
        [
            *sorted(metadata),
            "llama.rope.freq_base",
            "llama.attention.key_length",
            "llama.rope.scaling.type",
        ]
    )
    metadata |= data.draw(st.dictionaries(names, JSON, max_size=2))
    config = guarded(lambda: reader.model_config(metadata, sound[1]), PretrainedError)
    guarded(lambda: config and mapping.from_checkpoint("llama", config, sound[1]), PretrainedError)


def test_gguf_array_of_any_count(tmp_path, whole):
    # the library alone would read empty values for as long as the count says: 2^63
    at = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    (tmp_path / "x.gguf").write_bytes(whole[:at] + struct.pack("<Q", 2**63) + whole[at + 8 :])
    with pytest.raises(PretrainedError, match="is not a whole GGUF file"):
        reader.read(tmp_path / "x.gguf")


@pytest.mark.parametrize("shape", [(), (4,), (2, 4)])
def test_gpt2_attention_of_another_shape(shape):
    with pytest.raises(
        PretrainedError, match="not q, k and v side by side"
    ):  # 4 columns do not make three parts
        mapping.from_checkpoint(
            "gpt2", gpt2(), {"h.0.attn.c_attn.weight": np.ones(shape, np.float32)}
        )


def test_a_config_of_any_length(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # a hole: no bytes on the disk
    with pytest.raises(PretrainedError, match="larger than 16777216 bytes"):
        pretrained.load(tmp_path)


def test_layers_beyond_the_tensors():
    # the names of 2^40 layers are not listed
    config = llama(vocab_size=4, num_layers=2**40)
    with pytest.raises(PretrainedError, match="1099511627776 layers"):
        mapping.check_params(config, {"embed/embedding": np.ones((4, 32), np.float32)})
