"""Low-rank adapters in PEFT's format: those of a run as its tensors, and any of its
adapters merged into a base.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxppo.errors import PretrainedError
from jaxppo.models.shapes import ModelConfig
from jaxppo.pretrained import mapping

Tensors = dict[str, Float32[np.ndarray, "..."]]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "base"  # folder in an adapter's folder, of a base that no hub has
PREFIX = "base_model.model."
# Settings that make an adapter more than W + scale · B A, unless they are empty.
MORE = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "arrow_config",
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "kasa_config",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to initialise


def from_run(
    family: str, model: ModelConfig, adapters: Mapping[str, Any], *, alpha: float, rslora: bool
) -> tuple[dict[str, Any], Tensors]:
    """(the settings in adapter_config.json that depend on the adapters, the tensors).

    GPT-2 has q, k and v in one matrix. With n of them adapted, its adapter has n times
    the rank: A = (A_q; A_k; A_v), and B has the blocks B_q, B_k and B_v.

    Args:
      adapters: layers_<i>/<place>/{lora_a [in r], lora_b [r out]}.
      alpha: the scale is alpha / r, or with `rslora` alpha / √r, here and in PEFT.

    Raises PretrainedError for adapters of anything but linear layers of a block.
    """
    flat, known = mapping.flatten(adapters), mapping.param_shapes(model)
    pairs, ranks = {}, set()
    for path in (name.removesuffix("/lora_a") for name in sorted(flat) if name.endswith("/lora_a")):
        if f"{path}/kernel" not in known:
            raise PretrainedError(f"an adapter of {path} cannot be exported: it is no linear layer")
        a, b = (np.asarray(flat[f"{path}/lora_{x}"], np.float32).T for x in "ab")
        pairs[_module(family, path)] = a, b
        ranks.add(len(a))
    (rank,) = ranks
    parts = sum(name.startswith("transformer.h.0.attn.") and name[-1] in "qkv" for name in pairs)
    joint = parts if family == "gpt2" and parts else 1
    modules = _joined(pairs) if family == "gpt2" else pairs
    targets = sorted({_target(name) for name in modules})
    # α / r of the joint matrix must be that of the others
    scaled = alpha * (joint**0.5 if rslora else joint)
    others = [name for name in targets if joint > 1 and name != "c_attn"]
    settings = {
        "r": joint * rank,
        "lora_alpha": _whole(scaled),
        "rank_pattern": dict.fromkeys(others, rank),
        "alpha_pattern": dict.fromkeys(others, _whole(alpha)),
        "use_rslora": rslora,
        "target_modules": targets,
        "fan_in_fan_out": family == "gpt2",  # GPT-2's layers store [in, out]
    }
    tensors = {
        f"{PREFIX}{name}.lora_{letter}.weight": x
        for name, pair in modules.items()
        for letter, x in zip("AB", pair, strict=True)
    }
    return settings, tensors


def _module(family: str, path: str) -> str:
    return mapping.their_name(family, f"{path}/kernel").removesuffix(".weight")


def _target(module: str) -> str:
    """What PEFT finds a module by, the end of its name. GPT-2 has two c_proj a block.

    >>> _target("transformer.h.0.attn.c_proj"), _target("model.layers.0.mlp.up_proj")
    ('attn.c_proj', 'up_proj')
    """
    *_, parent, name = module.split(".")
    return f"{parent}.{name}" if name == "c_proj" else name


def _whole(x: float) -> int | float:
    return int(x) if x == int(x) else x


def _joined(pairs: Mapping[str, tuple]) -> dict[str, tuple]:
    """The pairs (A, B) of q, k and v as one of the joint matrix; others as they are."""
    out, own = {}, {}
    for name, pair in pairs.items():
        if part := re.fullmatch(r"(.*\.attn\.)([qkv])", name):
            own.setdefault(f"{part[1]}c_attn", {})[part[2]] = pair
        else:
            out[name] = pair
    for name, parts in own.items():
        size, rank = next(iter(parts.values()))[1].shape
        b = np.zeros((3, size, len(parts), rank), np.float32)
        for column, part in enumerate(parts):
            b["qkv".index(part), :, column] = parts[part][1]
        a = np.concatenate([a for a, _ in parts.values()])
        out[name] = a, b.reshape(3 * size, len(parts) * rank)
    return out


def merge(
    family: str,
    params: Mapping[str, Any],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Float32[np.ndarray, "..."]],
) -> dict[str, Any]:
    """A base's parameters with an adapter added: W + scale · B A for each layer that it
    adapts, with the scale lora_alpha / r, or lora_alpha / √r with use_rslora.

    Args:
      params: float32, kernels [in out].
      settings: adapter_config.json.
      tensors: of adapter_model.safetensors.

    Raises PretrainedError for an adapter of another kind, and for one of a layer that
    the base does not have.
    """
    _check(settings)
    flat = mapping.flatten(params)
    body = lambda module: re.sub(mapping.BODY, "", module)  # some adapt the body alone
    layers = [path.removesuffix("/kernel") for path in flat if path.endswith("/kernel")]
    paths = {body(_module(family, layer)): f"{layer}/kernel" for layer in layers}
    for module, delta in _deltas(settings, tensors).items():
        path = paths.get(body(module), "")
        if not path or flat[path].shape != delta.shape:
            have = f"has the shape {flat[path].shape}" if path else "does not exist"
            raise PretrainedError(
                f"the adapter has {module}, {delta.shape} [in out], which {have} in its base"
            )
        flat[path] = flat[path] + delta
    return mapping.unflatten(flat)


def _deltas(settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Tensors:
    """What an adapter adds to each module's weight [in out], q, k and v apart."""
    out = {}
    for name in tensors:
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight", name)
        pair = [tensors.get(f"{PREFIX}{found[1]}.lora_{x}.weight") for x in "AB"] if found else []
        a, b = pair or (None, None)
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise PretrainedError(
                f"the adapter's tensor {name!r} is not one of a pair of low-rank matrices, [r in] "
                "and [out r], of a linear layer"
            )
        assert found is not None
        module = found[1]
        delta = _scale(settings, module, len(a)) * (b @ a).T
        if not module.endswith(".attn.c_attn"):
            out[module] = delta
            continue
        for part, piece in zip("qkv", np.array_split(delta, 3, axis=1), strict=True):
            out[f"{module.removesuffix('c_attn')}{part}"] = piece
    return out


def _check(settings: Mapping[str, Any]) -> None:
    """Raise PretrainedError for an adapter that is not W + scale · B A."""
    start = str(settings.get("init_lora_weights"))
    named = {name: settings.get(name) for name in MORE}
    named["bias"] = settings.get("bias") not in (None, "none") and settings["bias"]
    named["alpha_pattern"] = not isinstance(settings.get("alpha_pattern") or {}, dict)
    named[f"init_lora_weights {start[:40]}"] = start.startswith(CHANGES_BASE)
    for name in (name for name, x in named.items() if x):
        raise PretrainedError(
            f"the adapter has {name} set, which is not supported; merge it into its base, with "
            "PEFT's merge_and_unload, and save the whole model"
        )


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """α / r, or α / √r with use_rslora; the rank is that of the matrices."""
    alpha = settings.get("lora_alpha")
    for name, own in (settings.get("alpha_pattern") or {}).items():
        # PEFT takes patterns: one of a stranger's file could take forever
        if not re.fullmatch(r"[\w.]+", name):
            raise PretrainedError(f"the adapter's alpha_pattern {name[:40]!r} is not a plain name")
        alpha = own if f".{module}".endswith(f".{name}") else alpha
    if not isinstance(alpha, int | float) or rank == 0:
        raise PretrainedError(f"the adapter of {module} has lora_alpha {alpha!r} and rank {rank}")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
