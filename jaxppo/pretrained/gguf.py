"""Read a GGUF file of a Llama-shaped model: settings, weights under their usual names, and the tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from jaxppo.config import ModelConfig
from jaxppo.pretrained import gguf_bounds
from jaxppo.pretrained.errors import PretrainedError
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
    """What one file holds; the tensors carry the names, layout ([out, in]) and head order of a Llama checkpoint."""

    metadata: dict[str, Any]
    tensors: dict[str, Float32[np.ndarray, "..."]]
    tokenizer: Tokenizer


def read(path: Path) -> Gguf:
    """Read and dequantise a whole file.

    Raises:
        PretrainedError: when the package `gguf` is missing, the file is damaged, or the model is not Llama-shaped.
    """
    try:
        import gguf
    except ImportError as error:
        raise PretrainedError("reading GGUF needs the package gguf: pip install -e '.[demo]'") from error
    with _damage(path):
        gguf_bounds.check(path, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata.get("general.architecture") != "llama":
        found = str(metadata.get("general.architecture"))[:40]
        raise PretrainedError(f"{path} holds a {found!r} model; GGUF is read for llama only: give a safetensors folder")
    heads = {"q_proj": _int(metadata, "attention.head_count"), "k_proj": _kv_heads(metadata)}
    tensors = {}
    with _damage(path):
        for tensor in reader.tensors:
            name = llama_name(tensor.name)
            weights = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            part = name.split(".")[-2]
            tensors[name] = unpermute(weights, heads[part]) if part in heads else weights
        return Gguf(metadata, tensors, tokenizer(metadata))


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except PretrainedError:
        raise
    except Exception as error:  # what a stranger's file makes the libraries raise is not documented
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise PretrainedError(f"{path} is not a whole GGUF file ({reason}); download it again") from error


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
    raise PretrainedError(f"the GGUF file has a tensor {name!r} that the Llama shape lacks; give a safetensors folder")


def unpermute(weight: Float[np.ndarray, "out ..."], num_heads: int) -> Float[np.ndarray, "out ..."]:
    """Undo the row order that GGUF gives the q and k projections of Llama.

    GGUF pairs neighbouring rows (2i, 2i+1) of a head for the rotary embedding, while the model here, as in safetensors
    checkpoints, pairs row i with row i + head_dim/2: w[h, s, i] = stored[h, i, s], s in {0, 1}. Forgetting this gives
    nonsense, not an error.

    >>> unpermute(np.arange(4.0), 1).tolist()  # one head of 4 rows: pairs (0, 1), (2, 3) become halves
    [0.0, 2.0, 1.0, 3.0]
    """
    halves = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def config(metadata: Mapping[str, Any], tensors: Mapping[str, Float32[np.ndarray, "..."]]) -> ModelConfig:
    """The model's settings.

    Raises:
        PretrainedError: for a setting that is missing, is of another type, or that the one transformer does not have.
    """
    try:
        return _config(metadata, tensors)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise PretrainedError(f"the GGUF file's settings cannot be used ({str(error)[:200]}); download it again") from error


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Float32[np.ndarray, "..."]]) -> ModelConfig:
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise PretrainedError(f"the GGUF file scales its rotary embedding ({scaling!r}); give a safetensors folder")
    width, heads = _int(metadata, "embedding_length"), _int(metadata, "attention.head_count")
    head_dim = int(metadata.get("llama.attention.key_length", width // heads))
    if int(metadata.get("llama.rope.dimension_count", head_dim)) != head_dim:
        raise PretrainedError("the GGUF file rotates only a part of each head; give a safetensors folder")
    # The file has float32: the shortest decimal that is the same float32 is what its writer meant (1e-05).
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
        raise PretrainedError(f"the GGUF file has a {kind!r} tokenizer of kind {pre!r}; give a folder with a tokenizer.json")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    steps: list = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if pre == "smollm":  # each digit is a token of its own
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == SPECIAL]
    backend.add_special_tokens(special)
    return Tokenizer(
        backend,
        eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )
