"""The shapes of networks: `ModelConfig`, and functions that make one."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a network; GPT-2, Llama, Qwen, Mistral, Gemma are transformers."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int
    positions: str = "rope"
    """learned | rope"""
    rope_theta: float = 1e4
    rope_scaling: tuple[float, ...] | None = None
    """linear: factor; Llama 3's: factor, low_freq_factor, high_freq_factor,
    original_max_length
    """
    window_theta: float | None = None
    """rope_theta of the layers with a window, which are not scaled (Gemma 3)"""
    norm: str = "rms"
    """rms | rms_plus_one (it multiplies by 1 + scale, as Gemma does) | layer"""
    norm_eps: float = 1e-5
    activation: str = "silu"
    """silu | gelu | gelu_tanh"""
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    window: int | None = None
    """sliding-window attention: a token sees itself and the previous window - 1"""
    no_window: tuple[int, ...] = ()
    """numbers of layers, from 0, that see everything in spite of `window`"""
    no_rope: tuple[int, ...] = ()
    """numbers of layers, from 0, that do not rotate (NoPE, as in SmolLM3)"""
    post_norms: bool = False
    """norms behind attention and MLP too, before they are added (Gemma)"""
    scaled_embedding: bool = False
    """embeddings times √width"""
    query_size: int | None = None
    """attention scores are divided by its root, not by that of head_dim"""
    score_cap: float | None = None
    """attention scores s become cap · tanh(s / cap)"""
    logit_cap: float | None = None
    """logits likewise"""
    kind: str = "transformer"
    """transformer | gru | lstm | convolution | window"""
    kernel: int = 4
    """tokens that a convolution or window sees, including the current one"""
    dropout: float = 0.0
    """dropout of embeddings and last hidden states, in supervised training"""
    context_width: int = 0
    """features per frame of the context, such as mel bins; 0 = no context"""
    context_length: int = 0
    """maximum number of frames of the context; 0 = no limit"""


# What is the same in every GPT-2: learned positions, LayerNorm, biases.
GPT2_SHAPE: dict[str, Any] = {
    "positions": "learned",
    "norm": "layer",
    "gated": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}


def network(
    kind: str,
    *,
    vocab_size: int,
    width: int = 32,
    num_layers: int = 2,
    kernel: int = 4,
    max_length: int = 256,
    **rest: Any,
) -> ModelConfig:
    """A small network of any kind; `rest`: other fields of `ModelConfig`."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "width": width,
        "num_layers": num_layers,
        "max_length": max_length,
    }
    if kind == "transformer":
        return dataclasses.replace(llama(**sizes), **rest)
    return ModelConfig(
        **sizes,
        num_heads=1,
        num_kv_heads=1,
        head_dim=width,
        mlp_width=2 * width,
        kind=kind,
        kernel=kernel,
        **rest,
    )


def gpt2(
    *,
    vocab_size: int = 50257,
    width: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    max_length: int = 1024,
) -> ModelConfig:
    """A GPT-2 shape: learned positions, LayerNorm, GELU, biases, tied head."""
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        mlp_width=4 * width,
        max_length=max_length,
        activation="gelu_tanh",
        **GPT2_SHAPE,
    )


def llama(
    *,
    vocab_size: int,
    width: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_length: int = 256,
) -> ModelConfig:
    """A small Llama shape: rotary positions, RMSNorm, SwiGLU, grouped heads."""
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=width // num_heads,
        mlp_width=3 * width,
        max_length=max_length,
    )
