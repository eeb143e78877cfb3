"""A checkpoint's config.json becomes our settings, or is refused with a reason."""

from functools import partial

import pytest
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from jaxppo.errors import PretrainedError
from jaxppo.models.shapes import ModelConfig
from jaxppo.pretrained.settings import from_transformers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


def small(kind, **fields) -> ModelConfig:
    return from_transformers(kind(**(SMALL | fields)).to_dict())


def test_gpt2():
    assert from_transformers(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16).to_dict()
    ) == ModelConfig(
        vocab_size=64,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        mlp_width=128,
        max_length=16,
        positions="learned",
        norm="layer",
        norm_eps=1e-5,
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=True,
    )


def test_llama():
    assert small(LlamaConfig) == ModelConfig(
        vocab_size=64,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        max_length=128,
        rope_theta=1e4,
        norm_eps=1e-6,
        tied=False,
    )
    found = small(
        LlamaConfig, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16
    )
    assert (found.qkv_bias, found.out_bias, found.mlp_bias, found.tied, found.head_dim) == (
        True,
        True,
        True,
        True,
        16,
    )


def test_rope_scaling():
    found = small(LlamaConfig, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 64})
    assert found.rope_theta == 5e5 and found.rope_scaling == (8.0, 1.0, 4.0, 64.0)
    assert small(LlamaConfig, rope_parameters=LINEAR).rope_scaling == (2.0,)


def test_qwen():
    two, three = small(Qwen2Config), small(Qwen3Config, head_dim=16)
    assert (two.qkv_bias, two.out_bias, two.qk_norm, two.window) == (True, False, False, None)
    assert (three.qkv_bias, three.out_bias, three.qk_norm, three.head_dim) == (
        False,
        False,
        True,
        16,
    )


def test_windows():
    assert small(MistralConfig, sliding_window=7).window == 7
    assert small(MistralConfig, sliding_window=None).window is None
    assert (
        small(Qwen2Config, sliding_window=7).window is None
    )  # Qwen ignores it unless told to use it
    assert (
        small(Qwen2Config, sliding_window=7, use_sliding_window=True, max_window_layers=0).window
        == 7
    )
    for none in (0, -1):
        assert small(MistralConfig, sliding_window=none).window is None
    # transformers' Llama has no window, whatever its file says
    stored = LlamaConfig(**SMALL).to_dict() | {"layer_types": ["sliding_attention"] * 2}
    assert from_transformers(stored | {"sliding_window": 7}).window is None
    mixed = small(Qwen2Config, sliding_window=7, use_sliding_window=True, max_window_layers=1)
    assert (mixed.window, mixed.no_window) == (7, (0,))
    with pytest.raises(PretrainedError, match="kind of layer 'chunked_attention'"):
        from_transformers(layers_of("chunked_attention"))


def layers_of(kind: str) -> dict:
    return Qwen2Config(**SMALL).to_dict() | {"layer_types": [kind] * 2}


def test_gemma2():
    found = small(Gemma2Config, head_dim=16, query_pre_attn_scalar=8, sliding_window=7)
    assert (found.window, found.no_window, found.query_size) == (7, (1,), 8)
    assert (found.norm, found.post_norms, found.scaled_embedding) == ("rms_plus_one", True, True)
    assert (found.score_cap, found.logit_cap, found.activation) == (50.0, 30.0, "gelu_tanh")
    plain = small(Gemma2Config, head_dim=16, query_pre_attn_scalar=16, sliding_window=None)
    assert (plain.window, plain.no_window, plain.query_size) == (None, (), None)


def test_gemma3():
    """Layers with a window rotate by their own frequency, without the others' scaling."""
    rope = {"full_attention": LINEAR, "sliding_attention": {"rope_theta": 10.0}}
    types = ["sliding_attention", "full_attention"]
    gemma3 = partial(small, Gemma3TextConfig, head_dim=16, sliding_window=7, layer_types=types)
    found = gemma3(rope_parameters=rope)
    assert (found.window, found.no_window, found.qk_norm) == (7, (1,), True)
    assert (found.norm, found.post_norms, found.scaled_embedding) == ("rms_plus_one", True, True)
    assert (found.score_cap, found.logit_cap, found.query_size) == (None, None, 256)
    assert (found.rope_theta, found.rope_scaling, found.window_theta) == (1e4, (2.0,), 10.0)
    plain = gemma3()
    assert (plain.rope_theta, plain.rope_scaling, plain.window_theta) == (1e6, None, 1e4)
    alike = gemma3(rope_parameters=dict.fromkeys(types, LINEAR))
    assert (alike.rope_theta, alike.rope_scaling, alike.window_theta) == (1e4, (2.0,), None)
    wide = gemma3(layer_types=["full_attention"] * 2)
    assert (wide.window, wide.window_theta, wide.rope_theta) == (None, None, 1e6)
    # five with a window, then one without
    six = gemma3(num_hidden_layers=7, layer_types=None)
    assert (six.window, six.no_window) == (7, (5,))


def test_gemma3_that_reads_images_has_the_shape_of_its_language_model():
    whole = Gemma3Config(text_config=SMALL | {"head_dim": 16}).to_dict()
    assert from_transformers(whole) == small(Gemma3TextConfig, head_dim=16)


def test_layers_without_rotation():
    """SmolLM3's fourth, or those of its list. It has a window only if it is told to use it."""
    found = small(SmolLM3Config, num_hidden_layers=4, sliding_window=7)
    assert (found.no_rope, found.window, found.no_window) == ((3,), None, ())
    own = small(SmolLM3Config, no_rope_layers=[0, 1], use_sliding_window=True, sliding_window=7)
    assert (own.no_rope, own.window, own.no_window) == ((0,), 7, (1,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t5"}, "are gpt2, llama, mistral, qwen2, qwen3, smollm3, gemma2"),
        (
            Gemma2Config(use_bidirectional_attention=True).to_dict(),
            "sets use_bidirectional_attention, which is not supported",
        ),
        (
            Gemma3TextConfig(use_bidirectional_attention=True).to_dict(),
            "sets use_bidirectional_attention, which is not supported",
        ),
        (
            Gemma3TextConfig(attn_logit_softcapping=50.0).to_dict(),
            "sets attn_logit_softcapping, which is not supported",
        ),
        (
            Gemma3TextConfig(rope_parameters={"sliding_attention": LINEAR}).to_dict(),
            "sets a rotary scaling for sliding_attention, which is not supported",
        ),
        (LlamaConfig(hidden_act="relu").to_dict(), "'relu'"),
        (
            LlamaConfig(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ).to_dict(),
            "'dynamic'",
        ),
        (
            LlamaConfig(
                rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}
            ).to_dict(),
            "rotates only a part of each head",
        ),
        (
            GPT2Config(scale_attn_by_inverse_layer_idx=True).to_dict(),
            "scale_attn_by_inverse_layer_idx",
        ),
        (GPT2Config(scale_attn_weights=False).to_dict(), "scale_attn_weights"),
        (
            LlamaConfig(**SMALL).to_dict() | {"num_key_value_heads": 3},
            "4 attention heads and 3 heads of keys",
        ),
        (LlamaConfig(**SMALL).to_dict() | {"num_hidden_layers": 0}, "num_layers is 0"),
        (LlamaConfig(**SMALL).to_dict() | {"head_dim": 7}, "7 dimensions"),
        (GPT2Config().to_dict() | {"n_head": 0}, "0 attention heads"),
    ],
)
def test_unsupported(settings, message):
    with pytest.raises(PretrainedError, match=message):
        from_transformers(settings)
