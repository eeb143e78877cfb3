"""Checkpoints of the supported families as our parameter tree, and back: names, layout,
shapes.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxppo.errors import PretrainedError
from jaxppo.models import make
from jaxppo.models.shapes import ModelConfig

Tensors = Mapping[str, Float32[np.ndarray, "..."]]

LLAMA_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention/q",
    "self_attn.k_proj": "attention/k",
    "self_attn.v_proj": "attention/v",
    "self_attn.o_proj": "attention/o",
    "self_attn.q_norm": "attention/q_norm",
    "self_attn.k_norm": "attention/k_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
}

GPT2_NAMES = {
    "ln_1": "attention_norm",
    "attn.c_proj": "attention/o",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp/up",
    "mlp.c_proj": "mlp/down",
}

# constants that old checkpoints stored
BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)"


def params(family: str, model: ModelConfig, tensors: Tensors) -> dict[str, Any]:
    """Our parameter tree from a checkpoint's tensors, names and shapes checked against
    the settings.

    Raises:
        PretrainedError: for a missing, unknown or wrongly shaped tensor.
    """
    flat = _from_gpt2(tensors) if family == "gpt2" else _from_llama(tensors)
    if model.tied:
        flat.pop("head/kernel", None)  # some writers store the shared matrix twice
    return unflatten(checked(model, flat))


def _from_gpt2(tensors: Tensors) -> dict[str, np.ndarray]:
    flat = {}
    top = {"wte.weight": "embed/embedding", "wpe.weight": "positions/embedding"}
    for name, tensor in _stripped(tensors, "transformer.").items():
        match = re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in top:
            flat[top[name]] = tensor
        elif name in ("ln_f.weight", "ln_f.bias"):
            flat[f"final_norm/{'scale' if name.endswith('weight') else 'bias'}"] = tensor
        elif name == "lm_head.weight":
            flat["head/kernel"] = tensor.T
        elif match and match[2] == "attn.c_attn":
            if tensor.ndim < 1 or tensor.shape[-1] % 3:
                raise PretrainedError(
                    f"{name} has the shape {tensor.shape}, which is not q, k and v side by side"
                )
            for part, piece in zip("qkv", np.split(tensor, 3, axis=-1), strict=True):
                flat[f"layers_{match[1]}/attention/{part}/{_leaf(part, match[3])}"] = piece
        elif match and match[2] in GPT2_NAMES:
            ours = GPT2_NAMES[match[2]]
            flat[f"layers_{match[1]}/{ours}/{_leaf(ours, match[3])}"] = (
                tensor  # GPT-2 stores [in, out] already
            )
        else:
            raise _unknown(name)
    return flat


def _from_llama(tensors: Tensors) -> dict[str, np.ndarray]:
    flat = {}
    top = {"embed_tokens.weight": "embed/embedding", "norm.weight": "final_norm/scale"}
    for name, tensor in _stripped(tensors, "model.").items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in top:
            flat[top[name]] = tensor
        elif name == "lm_head.weight":
            flat["head/kernel"] = tensor.T
        elif match and match[2] in LLAMA_NAMES:
            ours = LLAMA_NAMES[match[2]]
            # PyTorch's Linear stores [out, in]
            flat[f"layers_{match[1]}/{ours}/{_leaf(ours, match[3])}"] = (
                tensor.T if tensor.ndim == 2 else tensor
            )
        else:
            raise _unknown(name)
    return flat


def tensors(
    family: str, model: ModelConfig, params: Mapping[str, Any]
) -> dict[str, Float32[np.ndarray, "..."]]:
    """`params` undone: a checkpoint's tensors under their family's names, in its
    layout.

    Raises:
        PretrainedError: when the parameters are not what the settings ask for.
    """
    flat = checked(model, flatten(params))
    return _to_gpt2(flat) if family == "gpt2" else _to_llama(flat)


def _to_gpt2(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    theirs = {ours: name for name, ours in GPT2_NAMES.items()}
    top = {
        "embed/embedding": "transformer.wte.weight",
        "positions/embedding": "transformer.wpe.weight",
    }
    for name, tensor in flat.items():
        module, _, leaf = name.rpartition("/")
        match = re.fullmatch(r"layers_(\d+)/(.+)", module)
        kind = "bias" if leaf == "bias" else "weight"
        if name in top:
            out[top[name]] = tensor
        elif name == "head/kernel":
            out["lm_head.weight"] = tensor.T
        elif not match:
            out[f"transformer.ln_f.{kind}"] = tensor
        elif match[2] == "attention/q":
            parts = [flat[f"layers_{match[1]}/attention/{part}/{leaf}"] for part in "qkv"]
            out[f"transformer.h.{match[1]}.attn.c_attn.{kind}"] = np.concatenate(parts, -1)
        elif match[2] not in ("attention/k", "attention/v"):
            out[f"transformer.h.{match[1]}.{theirs[match[2]]}.{kind}"] = tensor
    return out


def _to_llama(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    theirs = {ours: name for name, ours in LLAMA_NAMES.items()}
    top = {"embed/embedding": "model.embed_tokens.weight", "final_norm/scale": "model.norm.weight"}
    for name, tensor in flat.items():
        module, _, leaf = name.rpartition("/")
        match = re.fullmatch(r"layers_(\d+)/(.+)", module)
        if name in top:
            out[top[name]] = tensor
        elif not match:
            out["lm_head.weight"] = tensor.T
        else:
            kind = "bias" if leaf == "bias" else "weight"
            out[f"model.layers.{match[1]}.{theirs[match[2]]}.{kind}"] = (
                tensor.T if tensor.ndim == 2 else tensor
            )
    return out


def _stripped(tensors: Tensors, prefix: str) -> dict[str, np.ndarray]:
    """Without the body's prefix, which checkpoints of the bare body lack, and without
    constants.
    """
    return {
        name.removeprefix(prefix): t
        for name, t in tensors.items()
        if not re.fullmatch(BUFFERS, name)
    }


def _leaf(ours: str, theirs: str) -> str:
    if theirs == "bias":
        return "bias"
    return "scale" if ours.endswith("norm") else "kernel"


def _unknown(name: str) -> PretrainedError:
    return PretrainedError(
        f"the checkpoint has a tensor {name!r} that its family lacks; jaxppo would leave it out"
    )


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The path and shape of every parameter but the value head's; kernels are [in,
    out].
    """
    if model.kind != "transformer":
        import jax  # reading a checkpoint of the other families needs none

        made = flatten(jax.eval_shape(make(model).init, jax.random.key(0)))
        return {name: x.shape for name, x in made.items() if not name.startswith("value/")}
    d, q, kv = model.width, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    found: dict[str, tuple[int, ...]] = {"embed/embedding": (model.vocab_size, d)}
    if model.positions == "learned":
        found["positions/embedding"] = (model.max_length, d)
    dense = {"attention/q": (d, q, model.qkv_bias), "attention/k": (d, kv, model.qkv_bias)}
    dense |= {"attention/v": (d, kv, model.qkv_bias), "attention/o": (q, d, model.out_bias)}
    if model.gated:
        dense["mlp/gate"] = (d, model.mlp_width, model.mlp_bias)
    dense |= {
        "mlp/up": (d, model.mlp_width, model.mlp_bias),
        "mlp/down": (model.mlp_width, d, model.mlp_bias),
    }
    norms = ["final_norm"]
    for layer in range(model.num_layers):
        for name, (rows, columns, bias) in dense.items():
            found[f"layers_{layer}/{name}/kernel"] = (rows, columns)
            found |= {f"layers_{layer}/{name}/bias": (columns,)} if bias else {}
        if model.qk_norm:
            found |= {
                f"layers_{layer}/attention/{part}_norm/scale": (model.head_dim,) for part in "qk"
            }
        norms += [f"layers_{layer}/attention_norm", f"layers_{layer}/mlp_norm"]
    for name in norms:
        found[f"{name}/scale"] = (d,)
        found |= {f"{name}/bias": (d,)} if model.norm == "layer" else {}
    if not model.tied:
        found["head/kernel"] = (d, model.vocab_size)
    return found


def checked(model: ModelConfig, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors, once every name and shape is what the settings ask for."""
    if model.num_layers > len(
        flat
    ):  # before a list of that length is made: each layer has several tensors
        raise PretrainedError(
            f"the checkpoint has {len(flat)} tensors, too few for {model.num_layers} layers; download it again"
        )
    expected = shapes(model)
    if missing := sorted(set(expected) - set(flat)):
        raise PretrainedError(
            f"the checkpoint lacks {missing[0]} (and {len(missing) - 1} more); download it again"
        )
    if extra := sorted(set(flat) - set(expected)):
        raise PretrainedError(
            f"the checkpoint has {extra[0]} (and {len(extra) - 1} more), which its config.json does not ask for"
        )
    for name, shape in expected.items():
        if flat[name].shape != shape:
            raise PretrainedError(
                f"{name} has the shape {flat[name].shape}, but config.json asks for {shape}"
            )
    return {name: np.ascontiguousarray(flat[name], np.float32) for name in expected}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with `/` between the names.

    >>> flatten({"a": {"b": 1, "c": 2}})
    {'a/b': 1, 'a/c': 2}
    """
    flat = {}
    for name, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{name}/")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree
