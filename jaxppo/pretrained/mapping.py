"""Convert checkpoints of the supported families to our parameter tree, and back."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float32

from jaxppo.errors import PretrainedError, first_line
from jaxppo.models import make
from jaxppo.models.shapes import ModelConfig

Tensors = Mapping[str, Float32[np.ndarray, "..."]]

# Modules of a checkpoint, ours -> theirs; those of a layer stand behind its prefix.
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}

GEMMA_NAMES = LLAMA_NAMES | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}

GPT2_NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "attention_norm": "ln_1",
    # one matrix in the checkpoint, `JOINT`
    "attention/q": "attn.q",
    "attention/k": "attn.k",
    "attention/v": "attn.v",
    "attention/o": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}

JOINT = r"(.*attn\.)c_attn\.(weight|bias)"
# constants that old checkpoints stored
BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)"
# tensors that other libraries' wrappers add or rename, and what to do
FOREIGN = {
    r"base_model\.|.*\.lora_": "it is of an adapter: merge it into its base, and save the whole",
    r"(_orig_mod|module)\.": "save the model inside the wrapper, such as torch.compile's",
    r"(pretrained_model|v_head)\.": "it is of a value head: save the language model alone",
    r"(score|classifier|qa_outputs)\.": "it is of another head: give a causal language model",
}
# of a checkpoint that reads images: before its language model's names, and other parts
LANGUAGE_MODEL = r"^(model\.)?language_model\.(model\.)?"
VISION = r"(model\.)?(vision_tower|multi_modal_projector)\."
# what checkpoints of the body alone lack
BODY = r"^(model|transformer)\."


def untie(family: str, model: ModelConfig, tensors: Tensors) -> ModelConfig:
    """Return the shape with a head of its own if the checkpoint stores one that differs
    from the embedding, whatever its config.json says; transformers uses it, too.
    """
    head = tensors.get("lm_head.weight")
    if not model.tied or head is None:
        return model
    name = re.sub(BODY, "", their_name(family, "embed/embedding"))
    embedding = next((x for n, x in tensors.items() if re.sub(BODY, "", n) == name), head)
    return model if np.array_equal(head, embedding) else dataclasses.replace(model, tied=False)


def language_model(tensors: Tensors) -> Tensors:
    """Return the tensors of a checkpoint's language model, if it also reads images."""
    own = {name: x for name, x in tensors.items() if not re.match(VISION, name)}
    return {re.sub(LANGUAGE_MODEL, "", name): x for name, x in own.items()}


def from_checkpoint(family: str, model: ModelConfig, tensors: Tensors) -> dict[str, Any]:
    """Return our parameter tree. Raises PretrainedError for a wrong tensor."""
    tensors = {name: x for name, x in tensors.items() if not re.fullmatch(BUFFERS, name)}
    if family == "gpt2":
        tensors = _split_joint(tensors)
    if model.tied:  # some writers store the shared matrix twice
        tensors.pop("lm_head.weight", None)
    _check_layers(model, tensors)
    ours = {re.sub(BODY, "", their_name(family, path)): path for path in param_shapes(model)}
    flat = {}
    for name, tensor in tensors.items():
        path = ours.get(re.sub(BODY, "", name))
        if path is None:
            cure = next((x for pattern, x in FOREIGN.items() if re.match(pattern, name)), "")
            raise PretrainedError(
                f"the checkpoint has a tensor {name!r} that its settings do not ask for"
                + f"; {cure}" * bool(cure)
            )
        flat[path] = tensor.T if _is_transposed(family, path) else tensor
    return unflatten(check_params(model, flat))


def to_checkpoint(
    family: str, model: ModelConfig, params: Mapping[str, Any]
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Return a family's tensors. Raises PretrainedError for wrong parameters."""
    tensors = {}
    for path, x in check_params(model, flatten(params)).items():
        tensors[their_name(family, path)] = x.T if _is_transposed(family, path) else x
    return _join_qkv(tensors) if family == "gpt2" else tensors


def their_name(family: str, path: str) -> str:
    """Return the name of a parameter in a family's checkpoints."""
    module, _, leaf = path.rpartition("/")
    gpt2 = family == "gpt2"
    layers = "transformer.h" if gpt2 else "model.layers"
    names = GPT2_NAMES if gpt2 else GEMMA_NAMES if "gemma" in family else LLAMA_NAMES
    prefix = ""
    if layer := re.match(r"layers_(\d+)/", module):
        prefix, module = f"{layers}.{layer[1]}.", module[layer.end() :]
    return f"{prefix}{names[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def _is_transposed(family: str, path: str) -> bool:
    """Whether the checkpoint stores [out, in], as PyTorch's Linear does."""
    return path.endswith("/kernel") and (family != "gpt2" or path == "head/kernel")


def _split_joint(tensors: Tensors) -> dict[str, np.ndarray]:
    """Cut GPT-2's joint matrix into q, k and v."""
    out = {}
    for name, tensor in tensors.items():
        joint = re.fullmatch(JOINT, name)
        if joint is None:
            out[name] = tensor
            continue
        if tensor.ndim < 1 or tensor.shape[-1] % 3:
            raise PretrainedError(
                f"{name} has the shape {tensor.shape}, which is not q, k and v side by side"
            )
        for part, piece in zip("qkv", np.split(tensor, 3, axis=-1), strict=True):
            out[f"{joint[1]}{part}.{joint[2]}"] = piece
    return out


def _join_qkv(tensors: Tensors) -> dict[str, np.ndarray]:
    """Undo `_split_joint`."""
    out = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(r"(.*attn\.)([qkv])\.(weight|bias)", name)
        if part is None:
            out[name] = tensor
        elif part[2] == "q":
            pieces = [tensors[f"{part[1]}{x}.{part[3]}"] for x in "qkv"]
            out[f"{part[1]}c_attn.{part[3]}"] = np.concatenate(pieces, -1)
    return out


def param_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the path and shape of all parameters but the value head's. Raises
    PretrainedError for sizes that no network has.
    """
    # a transformer's layers are alike, and tracing a deep one takes seconds
    one = dataclasses.replace(model, num_layers=1) if model.kind == "transformer" else model
    try:
        made = flatten(jax.eval_shape(make(one).init, jax.random.key(0)))
    except Exception as error:  # whatever the sizes in a stranger's file make JAX raise
        raise PretrainedError(
            f"no network has the checkpoint's sizes ({first_line(error)}); download it again"
        ) from error
    found: dict[str, tuple[int, ...]] = {}
    for path, x in made.items():
        layers = range(model.num_layers) if one is not model and "layers_0/" in path else [0]
        found |= {path.replace("layers_0/", f"layers_{i}/"): x.shape for i in layers}
    return {path: shape for path, shape in found.items() if not path.startswith("value/")}


def check_params(model: ModelConfig, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return contiguous float32 arrays. Raises PretrainedError for a wrong one."""
    _check_layers(model, flat)
    expected = param_shapes(model)
    if set(expected) - set(flat) == {"head/kernel"}:
        raise PretrainedError(
            "the checkpoint has no output layer (lm_head.weight), and its settings do not tie it "
            "to the embedding"
        )
    if missing := sorted(set(expected) - set(flat)):
        raise PretrainedError(
            f"the checkpoint lacks {missing[0]} (and {len(missing) - 1} more); download it again"
        )
    if extra := sorted(set(flat) - set(expected)):
        raise PretrainedError(
            f"the checkpoint has {extra[0]!r} (and {len(extra) - 1} more), "
            "which its settings do not ask for"
        )
    for name, shape in expected.items():
        if flat[name].shape != shape:
            raise PretrainedError(
                f"{name} has the shape {flat[name].shape}, but the settings ask for {shape}"
            )
    return {name: np.ascontiguousarray(flat[name], np.float32) for name in expected}


def _check_layers(model: ModelConfig, flat: Mapping[str, np.ndarray]) -> None:
    """Check the number of layers before a list of that length is made."""
    if model.num_layers > len(flat):
        raise PretrainedError(
            f"the checkpoint has {len(flat)} tensors, too few for {model.num_layers} layers; "
            "download it again"
        )


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts as one, with paths such as "a/b"."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    return unflatten_dict(flat, sep="/")
