"""Read a GGUF file of a Llama-shaped model: settings, weights, tokenizer.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from tokenizers import AddedToken, models, pre_tokenizers

from jaxppo.errors import PretrainedError, first_line
from jaxppo.models.shapes import ModelConfig
from jaxppo.pretrained.tokenizer import Tokenizer, begin_with, byte_level

# types of tokens: special ones, those that are never split, and ids without a token
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
# what the file calls them, and templates
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
ENDS = ("eos", "eot", "eom")

BLOCK_NAMES = {
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

TOP_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Float32[np.ndarray, "..."]], Tokenizer]:
    """Read and dequantise a file: (metadata, tensors with a Llama checkpoint's names,
    layout and head order, tokenizer). Raises PretrainedError when the package `gguf` is
    missing, the file is damaged, or the model is not Llama-shaped.
    """
    try:
        import gguf  # an optional extra
    except ImportError as error:
        raise PretrainedError(
            "reading GGUF needs the package gguf: pip install -e '.[demo]'"
        ) from error
    with _explained(f"{path} is not a whole GGUF file"):
        reader = _open(gguf, path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        if (parts := int(metadata.get("split.count", 1))) > 1:
            raise PretrainedError(
                f"{path} is one of {parts} parts of a model; join them with llama.cpp's "
                "llama-gguf-split --merge"
            )
        if metadata.get("general.architecture") != "llama":
            found = str(metadata.get("general.architecture"))[:40]
            raise PretrainedError(
                f"{path} holds a {found!r} model; GGUF is read for llama only: "
                "give a safetensors folder"
            )
        heads = {"q_proj": _int(metadata, "attention.head_count"), "k_proj": _kv_heads(metadata)}
        tensors = {}
        for tensor in reader.tensors:
            name = llama_name(tensor.name)
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weights, part = np.asarray(weights, np.float32), name.split(".")[-2]
            tensors[name] = unpermute(weights, heads[part]) if part in heads else weights
        return metadata, tensors, make_tokenizer(metadata)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise any error as PretrainedError: the libraries' errors are not documented."""
    try:
        yield
    except PretrainedError:
        raise
    except Exception as error:
        raise PretrainedError(f"{what} ({first_line(error)}); download it again") from error


def _open(gguf: Any, path: Path) -> Any:
    """Open a file with the package `gguf`, whose reader would give empty values beyond
    the end. Raises ValueError there, and for tensors that are larger than the file.
    """

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            found = super()._get(offset, dtype, count, override_order)
            if len(found) != count:
                raise ValueError(f"{count} values at byte {offset} are not all there")
            return found

    found = Reader(path)
    # thousands of tensors at the same bytes would each become an array
    if sum(int(x.n_bytes) for x in found.tensors) > len(found.data):
        raise ValueError("its tensors have more bytes than the file")
    return found


def model_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, Float32[np.ndarray, "..."]]
) -> ModelConfig:
    """Return the model's config. Raises PretrainedError for an unusable setting."""
    with _explained("the GGUF file's settings cannot be used"):
        scaling = metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise PretrainedError(
                f"the GGUF file scales its rotary embedding ({scaling!r}); "
                "give a safetensors folder"
            )
        width, heads = _int(metadata, "embedding_length"), _int(metadata, "attention.head_count")
        head_dim = int(metadata.get("llama.attention.key_length", width // heads))
        if int(metadata.get("llama.rope.dimension_count", head_dim)) != head_dim:
            raise PretrainedError(
                "the GGUF file rotates only a part of each head; give a safetensors folder"
            )
        # The file has float32: the shortest decimal that is the same float32 is what
        # its writer meant (1e-05).
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


def llama_name(name: str) -> str:
    """Return a tensor's name in a Llama checkpoint."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in BLOCK_NAMES:
        return f"layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{match[3]}"
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    raise PretrainedError(
        f"the GGUF file has a tensor {name!r} that a Llama does not; give a safetensors folder"
    )


def unpermute(weight: Float[np.ndarray, "out ..."], num_heads: int) -> Float[np.ndarray, "out ..."]:
    """Undo the row order that GGUF gives the q and k projections of Llama. GGUF pairs
    neighbouring rows (2i, 2i + 1) of a head for the rotary embedding, our model rows i
    and i + head_dim / 2. If forgotten, the text is nonsense.

    >>> unpermute(np.arange(4.0), 1).tolist()  # pairs (0, 1), (2, 3) become halves
    [0.0, 2.0, 1.0, 3.0]
    """
    halves = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def make_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the byte-level BPE tokenizer that the file describes."""
    about = {name.removeprefix("tokenizer.ggml."): x for name, x in metadata.items()}
    kind, pre = about.get("model"), about.get("pre", "default")
    if kind != "gpt2" or pre not in ("smollm", "gpt-2", "default"):
        raise PretrainedError(
            f"the GGUF file has a {kind!r} tokenizer of kind {pre!r}; "
            "give a folder with a tokenizer.json"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in about["merges"]]
    kinds = list(zip(about["tokens"], about["token_type"], strict=True))
    ids = {token: i for i, (token, kind) in enumerate(kinds) if kind != UNUSED}
    of_kind = lambda wanted: [token for token, kind in kinds if kind == wanted]
    backend = byte_level(models.BPE(ids, merges), special=of_kind(CONTROL))
    backend.add_tokens([AddedToken(x, normalized=False) for x in of_kind(USER_DEFINED)])
    if pre == "smollm":  # each digit is a token of its own
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    ids_of = {name: about.get(f"{name}_token_id") for name in (*NAMED, *ENDS)}
    named = {name: int(i) for name, i in ids_of.items() if i is not None}
    tokens = dict(enumerate(about["tokens"]))
    if about.get("add_bos_token") and named.get("bos") in tokens:
        backend.post_processor = begin_with({tokens[named["bos"]]: named["bos"]})
    return Tokenizer(
        backend,
        eos_id=[named[name] for name in ENDS if name in named],
        bos_id=named.get("bos"),
        pad_id=named.get("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={
            theirs: tokens[named[name]]
            for name, theirs in NAMED.items()
            if named.get(name) in tokens
        },
    )
