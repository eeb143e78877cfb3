"""Convert a checkpoint's config.json to our `ModelConfig`, and back."""

from collections.abc import Mapping
from typing import Any

from jaxppo.errors import PretrainedError
from jaxppo.models.shapes import GPT2_SHAPE, ModelConfig

GEMMAS = ("gemma2", "gemma3_text")
# models that also read images -> the family of their language model
TEXT_PARTS = {"gemma3": "gemma3_text"}
# SmolLM is a llama, Qwen2.5 a qwen2
FAMILIES = (
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3", *GEMMAS, *TEXT_PARTS,
)  # fmt: skip
BIASED = ("llama", "qwen3", "smollm3", *GEMMAS)  # where attention_bias is a setting

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}

# fmt: off
# Fields that both sides have, ours -> theirs.
GPT2_FIELDS = {
    "vocab_size": "vocab_size", "width": "n_embd", "num_layers": "n_layer", "num_heads": "n_head",
    "max_length": "n_positions", "norm_eps": "layer_norm_epsilon", "tied": "tie_word_embeddings",
}
LLAMA_FIELDS = {
    "vocab_size": "vocab_size", "width": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "mlp_width": "intermediate_size",
    "max_length": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}

# What is the same in every model of a family.
GPT2_ONLY = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
GEMMA_SHAPE = {"norm": "rms_plus_one", "post_norms": True, "scaled_embedding": True}
PLAIN_SHAPE = {
    "post_norms": False, "scaled_embedding": False, "query_size": None, "score_cap": None,
    "logit_cap": None, "window_theta": None,
}
ROPE_SCALING = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)
# fmt: on


def from_transformers(stored: Mapping[str, Any]) -> ModelConfig:
    """Return our config from `transformers.AutoConfig(...).to_dict()`. Raises
    PretrainedError for a family or a setting that our transformer does not have.
    """
    family = stored["model_type"]
    _choose("model type", family, FAMILIES)
    if family in TEXT_PARTS:
        return from_transformers(stored["text_config"])
    make = _from_gpt2 if family == "gpt2" else _from_llama
    try:
        return check_shape(make(stored))
    except ZeroDivisionError:
        raise PretrainedError("the checkpoint has 0 attention heads; it needs at least 1") from None


def check_shape(model: ModelConfig) -> ModelConfig:
    """Return the shape. Raises PretrainedError for one that no network can have."""
    for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
        if getattr(model, name) < 1:
            raise PretrainedError(
                f"the checkpoint's {name} is {getattr(model, name)}; it needs at least 1"
            )
    if model.num_heads % model.num_kv_heads:
        raise PretrainedError(
            f"the checkpoint has {model.num_heads} attention heads and {model.num_kv_heads} heads "
            "of keys and values; the first must be a multiple of the second"
        )
    if model.positions == "rope" and model.head_dim % 2:
        raise PretrainedError(
            f"the checkpoint's heads have {model.head_dim} dimensions; a rotary embedding needs "
            "an even number"
        )
    return model


def _choose(what: str, value: Any, choices: Mapping | tuple) -> None:
    if value not in choices:
        raise PretrainedError(
            f"the {what} {value!r} is not supported; the supported ones are {', '.join(choices)}"
        )


def _from_gpt2(stored: Mapping[str, Any]) -> ModelConfig:
    for name, only in GPT2_ONLY.items():
        if stored[name] is not only:
            raise PretrainedError(
                f"the checkpoint sets {name}={stored[name]}, which is not supported; "
                f"it must be {only}"
            )
    width, heads = stored["n_embd"], stored["n_head"]
    _choose("activation", stored["activation_function"], ACTIVATIONS)
    return ModelConfig(
        **{ours: stored[name] for ours, name in GPT2_FIELDS.items()},
        **GPT2_SHAPE,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=stored["n_inner"] or 4 * width,
        activation=ACTIVATIONS[stored["activation_function"]],
    )


def _from_llama(stored: Mapping[str, Any]) -> ModelConfig:
    family, heads = stored["model_type"], stored["num_attention_heads"]
    bias = family in BIASED and bool(stored.get("attention_bias"))
    window, no_window = _windows(stored)
    rotated = stored["no_rope_layers"] if family == "smollm3" else ()
    rope = stored["rope_parameters"]
    theta, scaling = _rope(rope["full_attention"] if family == "gemma3_text" else rope)
    activation = stored["hidden_activation" if family in GEMMAS else "hidden_act"]
    _choose("activation", activation, ACTIVATIONS)
    return ModelConfig(
        **{ours: stored[name] for ours, name in LLAMA_FIELDS.items()},
        **(_only_gemma(stored) if family in GEMMAS else {}),
        num_kv_heads=stored.get("num_key_value_heads") or heads,
        head_dim=stored.get("head_dim") or stored["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        activation=ACTIVATIONS[activation],
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(stored.get("mlp_bias")) and family in ("llama", "smollm3"),
        qk_norm=family in ("qwen3", "gemma3_text"),
        window=window,
        window_theta=_window_theta(rope) if window and family == "gemma3_text" else None,
        no_window=no_window,
        no_rope=tuple(i for i, rotates in enumerate(rotated) if not rotates),
    )


def _only_gemma(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return what other families do not have."""
    refused = ["use_bidirectional_attention"]
    if stored["model_type"] == "gemma3_text":  # transformers ignores it, others may not
        refused.append("attn_logit_softcapping")
    for name in (name for name in refused if stored[name]):
        raise PretrainedError(f"the checkpoint sets {name}, which is not supported")
    query, size = stored["query_pre_attn_scalar"], stored["head_dim"]
    cap = lambda name: None if stored[name] is None else float(stored[name])
    return {
        **GEMMA_SHAPE,
        "query_size": None if query == size else query,
        "score_cap": cap("attn_logit_softcapping"),
        "logit_cap": cap("final_logit_softcapping"),
    }


def _rope(rope: Mapping[str, Any]) -> tuple[float, tuple[float, ...] | None]:
    """Return the base frequency and the scaling, linear or Llama 3's, or None."""
    kind = rope.get("rope_type", "default")
    _choose("rotary scaling", kind, ("default", "linear", "llama3"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise PretrainedError(
            "the checkpoint rotates only a part of each head, which is not supported"
        )
    if kind == "default":
        return float(rope["rope_theta"]), None
    names = ROPE_SCALING if kind == "llama3" else ROPE_SCALING[:1]
    return float(rope["rope_theta"]), tuple(float(rope[name]) for name in names)


def _window_theta(rope: Mapping[str, Any]) -> float | None:
    """Return the base frequency of layers with a window; None if all rotate alike."""
    wide, narrow = _rope(rope["full_attention"]), _rope(rope["sliding_attention"])
    if narrow == wide:
        return None
    if narrow[1] is not None:
        raise PretrainedError(
            "the checkpoint sets a rotary scaling for sliding_attention, which is not supported"
        )
    return narrow[0]


def _windows(stored: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """Return the sliding window, and the numbers of the layers without it; 0 and -1
    mean none. Llama has none in transformers, whatever the file says.
    """
    window, family = stored.get("sliding_window"), stored["model_type"]
    window = window if window is not None and window > 0 else None
    kinds = stored.get("layer_types") or []
    if family == "mistral":
        return window, ()
    if family == "llama" or (family == "smollm3" and not stored["use_sliding_window"]):
        return None, ()
    for kind in kinds:
        _choose("kind of layer", kind, ("full_attention", "sliding_attention"))
    if window is None or "sliding_attention" not in kinds:
        return None, ()
    return window, tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")


def family_of(model: ModelConfig) -> str:
    """Return transformers' family of this shape. Raises PretrainedError for none."""
    has = lambda **fields: all(getattr(model, name) == x for name, x in fields.items())
    biases = (model.qkv_bias, model.out_bias, model.mlp_bias)
    if has(kind="transformer", context_width=0):
        if (
            has(**GPT2_SHAPE, **PLAIN_SHAPE, qk_norm=False, window=None, no_rope=())
            and has(num_kv_heads=model.num_heads)
            and model.head_dim * model.num_heads == model.width
        ):
            return "gpt2"
        modern = has(positions="rope", gated=True)
        plain, alike = has(**PLAIN_SHAPE, norm="rms"), has(qkv_bias=model.out_bias)
        families = {
            "qwen3": model.qk_norm and biases in ((False, False, False), (True, True, False)),
            "qwen2": not model.qk_norm and biases == (True, False, False),
            "llama": has(qk_norm=False, window=None) and alike,
            "mistral": has(qk_norm=False, no_window=()) and not any(biases),
        }
        if not has(no_rope=()):
            families = {"smollm3": not model.qk_norm and alike}
        if not plain:
            families = {
                "gemma2": has(qk_norm=False, window_theta=None),
                "gemma3_text": has(qk_norm=True, score_cap=None),
            }
            modern &= has(**GEMMA_SHAPE, no_rope=(), mlp_bias=False) and alike
        if found := [family for family, fits in families.items() if modern and fits]:
            return found[0]
    what = "a transformer of this shape" if has(kind="transformer") else f"a {model.kind} policy"
    raise PretrainedError(f"transformers has no class for {what}; only jaxppo can load it")


def to_transformers(model: ModelConfig) -> dict[str, Any]:
    """Return what config.json says of the network. Raises PretrainedError."""
    family = family_of(model)
    names = {
        "gpt2": "GPT2LMHeadModel",
        "smollm3": "SmolLM3ForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
    }
    name = names.get(family, f"{family.capitalize()}ForCausalLM")
    fields = GPT2_FIELDS if family == "gpt2" else LLAMA_FIELDS
    return {
        "architectures": [name],
        "model_type": family,
        **{theirs: getattr(model, ours) for ours, theirs in fields.items()},
        **(_to_gpt2(model) if family == "gpt2" else _to_llama(model, family)),
    }


def _to_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_inner": model.mlp_width,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(model.activation, model.activation),
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _to_llama(model: ModelConfig, family: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None and len(model.rope_scaling) == 1:
        rope |= {"rope_type": "linear", "factor": model.rope_scaling[0]}
    elif model.rope_scaling is not None:
        *factors, original = model.rope_scaling
        rope |= dict(zip(ROPE_SCALING, [*factors, int(original)], strict=True))
        rope["rope_type"] = "llama3"
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(model.activation, model.activation)
    out: dict[str, Any] = {
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "attention_dropout": 0.0,
        "hidden_activation" if family in GEMMAS else "hidden_act": activation,
        "rope_parameters": rope,
        # transformers 4 reads it here; without it, it silently takes its default
        "rope_theta": model.rope_theta,
    }
    if model.rope_scaling is not None:
        out["rope_scaling"] = rope
    if family in BIASED:
        out["attention_bias"] = model.qkv_bias
    if family in ("llama", "smollm3"):
        out["mlp_bias"] = model.mlp_bias
    if family == "smollm3":
        out["no_rope_layers"] = [int(i not in model.no_rope) for i in range(model.num_layers)]
    if family == "mistral":
        out["sliding_window"] = model.window
    elif family in GEMMAS:
        out |= {
            "query_pre_attn_scalar": model.query_size or model.head_dim,
            "attn_logit_softcapping": model.score_cap,
            "final_logit_softcapping": model.logit_cap,
            # transformers' class needs both, also where no layer has the window
            "layer_types": ["full_attention"] * model.num_layers,
            "sliding_window": model.max_length,
        }
    if family == "gemma3_text":
        theta, plain = model.window_theta, {"rope_type": "default"}
        narrow = rope if theta is None else plain | {"rope_theta": theta}
        out["rope_parameters"] = {"full_attention": rope, "sliding_attention": narrow}
        out["rope_local_base_freq"] = narrow["rope_theta"]
    if model.window is not None and family != "mistral":
        kinds = ("sliding_attention", "full_attention")
        out["layer_types"] = [kinds[i in model.no_window] for i in range(model.num_layers)]
        out |= {"use_sliding_window": True, "sliding_window": model.window, "max_window_layers": 0}
    return out
