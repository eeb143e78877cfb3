"""A checkpoint's config.json as our `ModelConfig`, and back."""

from collections.abc import Mapping
from typing import Any

from jaxppo.errors import PretrainedError
from jaxppo.models.shapes import ModelConfig

# SmolLM is a llama, Qwen2.5 a qwen2
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}


def config(settings: Mapping[str, Any]) -> ModelConfig:
    """Our settings from a checkpoint's, with all its defaults filled in
    (`transformers.AutoConfig(...).to_dict()`).

    Raises:
        PretrainedError: for a family or a setting that the one transformer does not
        have.
    """
    family = settings["model_type"]
    if family not in FAMILIES:
        raise PretrainedError(
            f"the model type {family!r} is not supported; the supported ones are {', '.join(FAMILIES)}"
        )
    return _gpt2_config(settings) if family == "gpt2" else _llama_config(settings)


def _gpt2_config(settings: Mapping[str, Any]) -> ModelConfig:
    for name, only in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if settings[name] is not only:
            raise PretrainedError(
                f"the checkpoint sets {name}={settings[name]}, which is not supported; it must be {only}"
            )
    width, heads = settings["n_embd"], settings["n_head"]
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        width=width,
        num_layers=settings["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=settings["n_inner"] or 4 * width,
        max_length=settings["n_positions"],
        positions="learned",
        norm="layer",
        norm_eps=settings["layer_norm_epsilon"],
        activation=_activation(settings["activation_function"]),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=settings["tie_word_embeddings"],
    )


def _llama_config(settings: Mapping[str, Any]) -> ModelConfig:
    family = settings["model_type"]
    theta, scaling = _rope(settings)
    heads = settings["num_attention_heads"]
    bias = bool(settings.get("attention_bias")) if family in ("llama", "qwen3") else False
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        width=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        mlp_width=settings["intermediate_size"],
        max_length=settings["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=settings["rms_norm_eps"],
        activation=_activation(settings["hidden_act"]),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(settings.get("mlp_bias")) and family == "llama",
        qk_norm=family == "qwen3",
        tied=settings["tie_word_embeddings"],
        window=_window(settings),
    )


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise PretrainedError(
            f"the activation {name!r} is not supported; the supported ones are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _rope(settings: Mapping[str, Any]) -> tuple[float, tuple[float, float, float, float] | None]:
    """Base frequency, and Llama 3's scaling where it is used."""
    rope = settings["rope_parameters"]
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise PretrainedError(
            f"the rotary scaling {kind!r} is not supported; the supported ones are default, llama3"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise PretrainedError(
            "the checkpoint rotates only a part of each head, which is not supported"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind == "default":
        return float(rope["rope_theta"]), None
    factor, low, high, original = (float(rope[name]) for name in names)
    return float(rope["rope_theta"]), (factor, low, high, original)


def _window(settings: Mapping[str, Any]) -> int | None:
    """The sliding window, when all layers have it."""
    if settings["model_type"] == "mistral":
        return settings.get("sliding_window")
    kinds = set(settings.get("layer_types") or ["full_attention"])
    if kinds == {"sliding_attention"}:
        return settings["sliding_window"]
    if kinds != {"full_attention"}:
        raise PretrainedError(
            "the checkpoint has a sliding window in some layers only, which is unsupported"
        )
    return None


GPT2_SHAPE = {
    "kind": "transformer",
    "positions": "learned",
    "norm": "layer",
    "gated": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "qk_norm": False,
    "window": None,
    "context_width": 0,
}

LLAMA_SHAPE = {
    "kind": "transformer",
    "positions": "rope",
    "norm": "rms",
    "gated": True,
    "context_width": 0,
}

CLASSES = {"gpt2": "GPT2LMHeadModel"} | {
    name: f"{name.capitalize()}ForCausalLM" for name in FAMILIES if name != "gpt2"
}


def family(model: ModelConfig) -> str:
    """The family of transformers' that has this shape. Raises PretrainedError when none
    has.

    >>> from dataclasses import replace
    >>> from jaxppo.config import gpt2, llama
    >>> (
    ...     family(gpt2()),
    ...     family(llama(vocab_size=8)),
    ...     family(replace(llama(vocab_size=8), qkv_bias=True)),
    ... )
    ('gpt2', 'llama', 'qwen2')
    """
    has = lambda shape: all(getattr(model, name) == value for name, value in shape.items())
    if (
        has(GPT2_SHAPE)
        and model.num_kv_heads == model.num_heads
        and model.head_dim * model.num_heads == model.width
    ):
        return "gpt2"
    biases, windowed = (model.qkv_bias, model.out_bias, model.mlp_bias), model.window is not None
    if has(LLAMA_SHAPE):
        if model.qk_norm and biases in ((False, False, False), (True, True, False)):
            return "qwen3"
        if not model.qk_norm and biases == (True, False, False):
            return "qwen2"
        if (
            not model.qk_norm
            and model.qkv_bias == model.out_bias
            and not (windowed and any(biases))
        ):
            return "mistral" if windowed else "llama"
    what = (
        f"a {model.kind} policy" if model.kind != "transformer" else "a transformer of this shape"
    )
    raise PretrainedError(
        f"transformers has no class for {what}; it can be kept and loaded by jaxppo alone"
    )


def as_transformers(model: ModelConfig) -> dict[str, Any]:
    """`config` undone: what config.json holds of the network. Dropout, of training
    alone, is left out.

    Raises:
        PretrainedError: when transformers has no class for the shape.
    """
    name = family(model)
    shared = {
        "architectures": [CLASSES[name]],
        "model_type": name,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied,
    }
    return shared | (_as_gpt2(model) if name == "gpt2" else _as_llama(model, name))


def _as_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.width,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_positions": model.max_length,
        "n_inner": model.mlp_width,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(model.activation, model.activation),
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _as_llama(model: ModelConfig, name: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        names = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        *factors, original = model.rope_scaling
        rope |= dict(zip(names, [*factors, int(original)], strict=True)) | {"rope_type": "llama3"}
    out: dict[str, Any] = {
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.max_length,
        "rms_norm_eps": model.norm_eps,
        "attention_dropout": 0.0,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(model.activation, model.activation),
        # transformers 4 reads the base frequency here, and without a word would take
        # its default
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,
    }
    if model.rope_scaling is not None:
        out["rope_scaling"] = rope
    if name in ("llama", "qwen3"):
        out["attention_bias"] = model.qkv_bias
    if name == "llama":
        out["mlp_bias"] = model.mlp_bias
    if name == "mistral":
        out["sliding_window"] = model.window
    elif model.window is not None:
        kinds = ["sliding_attention"] * model.num_layers
        out |= {
            "use_sliding_window": True,
            "sliding_window": model.window,
            "max_window_layers": 0,
            "layer_types": kinds,
        }
    return out
