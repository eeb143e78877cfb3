"""Shapes of networks."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """A network: GPT-2, Llama, SmolLM, Qwen and Mistral are points in the one
    transformer's space; `network` makes the others.
    """

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
    rope_scaling: tuple[float, float, float, float] | None = None
    """Llama 3's frequency scaling: factor, low_freq_factor, high_freq_factor,
    original_max_length
    """
    norm: str = "rms"
    """rms | layer"""
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
    """sliding-window attention: a token sees itself and the window - 1 tokens before
    it
    """
    kind: str = "transformer"
    """transformer | gru | lstm | convolution | window"""
    kernel: int = 4
    """tokens that a convolution or window sees, with its own"""
    dropout: float = 0.0
    """of embeddings and last hidden states, in supervised training"""
    context_width: int = 0
    """numbers in a frame of the features that the policy reads beside the tokens, such
    as mel bins; 0 = it reads none
    """
    context_length: int = 0
    """most frames of those features; 0 = any number"""


def network(
    kind: str,
    *,
    vocab_size: int,
    width: int = 32,
    num_layers: int = 2,
    kernel: int = 4,
    dropout: float = 0.0,
    max_length: int = 256,
    context_width: int = 0,
    context_length: int = 0,
) -> ModelConfig:
    """A small net of any kind; those without attention have no use for heads."""
    if kind == "transformer":
        shape = llama(
            vocab_size=vocab_size, width=width, num_layers=num_layers, max_length=max_length
        )
        return dataclasses.replace(
            shape, dropout=dropout, context_width=context_width, context_length=context_length
        )
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=1,
        num_kv_heads=1,
        head_dim=width,
        mlp_width=2 * width,
        max_length=max_length,
        kind=kind,
        kernel=kernel,
        dropout=dropout,
        context_width=context_width,
        context_length=context_length,
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
        positions="learned",
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
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
    """A small Llama shape: rotary positions, RMSNorm, SwiGLU, grouped key/value heads,
    tied head.
    """
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
