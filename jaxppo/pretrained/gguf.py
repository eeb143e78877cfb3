"""Read a GGUF file of a Llama-shaped model: settings, weights under their usual names,
and the tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from jaxppo.errors import PretrainedError
from jaxppo.models.shapes import ModelConfig
from jaxppo.pretrained.tokenizer import Tokenizer

SPECIAL = 3  # the token type that GGUF calls "control"

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

TOP = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}


class Gguf(NamedTuple):
    """What one file holds; the tensors carry the names, layout ([out, in]) and head
    order of a Llama checkpoint.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Float32[np.ndarray, "..."]]
    tokenizer: Tokenizer


def read(path: Path) -> Gguf:
    """Read and dequantise a whole file.

    Raises:
        PretrainedError: when the package `gguf` is missing, the file is damaged, or the
        model is not Llama-shaped.
    """
    try:
        import gguf
    except ImportError as error:
        raise PretrainedError(
            "reading GGUF needs the package gguf: pip install -e '.[demo]'"
        ) from error
    with _damage(path):
        check(path, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata.get("general.architecture") != "llama":
        found = str(metadata.get("general.architecture"))[:40]
        raise PretrainedError(
            f"{path} holds a {found!r} model; GGUF is read for llama only: give a safetensors folder"
        )
    heads = {"q_proj": _int(metadata, "attention.head_count"), "k_proj": _kv_heads(metadata)}
    tensors = {}
    with _damage(path):
        for tensor in reader.tensors:
            name = llama_name(tensor.name)
            weights = np.asarray(
                gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32
            )
            part = name.split(".")[-2]
            tensors[name] = unpermute(weights, heads[part]) if part in heads else weights
        return Gguf(metadata, tensors, tokenizer(metadata))


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except PretrainedError:
        raise
    # what a stranger's file makes the libraries raise is not documented
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise PretrainedError(
            f"{path} is not a whole GGUF file ({reason}); download it again"
        ) from error


def llama_name(name: str) -> str:
    """A tensor's name in a Llama checkpoint.

    >>> llama_name("blk.3.attn_q.weight")
    'layers.3.self_attn.q_proj.weight'
    """
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in BLOCK:
        return f"layers.{match[1]}.{BLOCK[match[2]]}.{match[3]}"
    if name in TOP:
        return TOP[name]
    raise PretrainedError(
        f"the GGUF file has a tensor {name!r} that the Llama shape lacks; give a safetensors folder"
    )


def unpermute(weight: Float[np.ndarray, "out ..."], num_heads: int) -> Float[np.ndarray, "out ..."]:
    """Undo the row order that GGUF gives the q and k projections of Llama.

    GGUF pairs neighbouring rows (2i, 2i+1) of a head for the rotary embedding, while
    the model here, as in safetensors checkpoints, pairs row i with row i + head_dim/2:
    w[h, s, i] = stored[h, i, s], s in {0, 1}. Forgetting this gives nonsense, not an
    error.

    >>> unpermute(
    ...     np.arange(4.0), 1
    ... ).tolist()  # one head of 4 rows: pairs (0, 1), (2, 3) become halves
    [0.0, 2.0, 1.0, 3.0]
    """
    halves = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def config(
    metadata: Mapping[str, Any], tensors: Mapping[str, Float32[np.ndarray, "..."]]
) -> ModelConfig:
    """The model's settings.

    Raises:
        PretrainedError: for a setting that is missing, is of another type, or that the
        one transformer does not have.
    """
    try:
        return _config(metadata, tensors)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise PretrainedError(
            f"the GGUF file's settings cannot be used ({str(error)[:200]}); download it again"
        ) from error


def _config(
    metadata: Mapping[str, Any], tensors: Mapping[str, Float32[np.ndarray, "..."]]
) -> ModelConfig:
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise PretrainedError(
            f"the GGUF file scales its rotary embedding ({scaling!r}); give a safetensors folder"
        )
    width, heads = _int(metadata, "embedding_length"), _int(metadata, "attention.head_count")
    head_dim = int(metadata.get("llama.attention.key_length", width // heads))
    if int(metadata.get("llama.rope.dimension_count", head_dim)) != head_dim:
        raise PretrainedError(
            "the GGUF file rotates only a part of each head; give a safetensors folder"
        )
    # The file has float32: the shortest decimal that is the same float32 is what its
    # writer meant (1e-05).
    eps = float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])))
    return ModelConfig(
        vocab_size=tensors["embed_tokens.weight"].shape[0],
        width=width,
        num_layers=_int(metadata, "block_count"),
        num_heads=heads,
        num_kv_heads=_kv_heads(metadata),
        head_dim=head_dim,
        mlp_width=_int(metadata, "feed_forward_length"),
        max_length=_int(metadata, "context_length"),
        rope_theta=float(metadata.get("llama.rope.freq_base", 1e4)),
        norm_eps=eps,
        tied="lm_head.weight" not in tensors,
    )


def _int(metadata: Mapping[str, Any], name: str) -> int:
    try:
        return int(metadata[f"llama.{name}"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PretrainedError(f"the GGUF file lacks llama.{name}; download it again") from error


def _kv_heads(metadata: Mapping[str, Any]) -> int:
    name = "attention.head_count_kv"
    return _int(metadata, name if f"llama.{name}" in metadata else "attention.head_count")


def tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that the file describes."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in ("smollm", "gpt-2", "default"):
        raise PretrainedError(
            f"the GGUF file has a {kind!r} tokenizer of kind {pre!r}; give a folder with a tokenizer.json"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    steps: list = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if pre == "smollm":  # each digit is a token of its own
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [
        AddedToken(t, special=True, normalized=False)
        for t, k in zip(tokens, types, strict=True)
        if k == SPECIAL
    ]
    backend.add_special_tokens(special)
    return Tokenizer(
        backend,
        eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


STRING, ARRAY = 8, 9

BYTES = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # of the other types of metadata

MAX_VALUES = (
    2**23
    # in all of a file's arrays; a vocabulary of 256 thousand tokens with its merges has
    # about 1.5 million
)
MAX_TENSORS = 2**16
MAX_DIMS = 4


def check(path: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
    """Walk the header, before anything is allocated: every count, length and offset
    lies within the file.

    The library checks none of them: past the end of the file it reads empty values, as
    many as a count of 64 bits says.

    Args:
        path: a GGUF file.
        sizes: (elements, bytes) of a block of each tensor type.

    Raises:
        ValueError, struct.error, KeyError: for what is out of bounds, or of an unknown
        type.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, fields = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        if tensors > MAX_TENSORS or fields > MAX_TENSORS:
            raise ValueError(
                f"its header counts {tensors} tensors and {fields} settings; at most {MAX_TENSORS} are read"
            )
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
        # arrays of arrays are not in use
        return _within(data, at + count * BYTES[kind]), values
    for _ in range(count):
        at = _past_string(data, at)
    return at, values


def _within(data: mmap.mmap, at: int) -> int:
    if at > len(data):
        raise ValueError(f"a part of its header ends at byte {at} of {len(data)}")
    return at


def _check_tensors(
    data: mmap.mmap, at: int, count: int, sizes: Mapping[int, tuple[int, int]]
) -> None:
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
    # The sum, too: thousands of tensors that all point at the same bytes would each
    # become an array.
    if max(at + ends, at + total) > len(data):
        raise ValueError(
            f"its tensors need {max(ends, total)} bytes after the header, but {len(data) - at} are there"
        )
