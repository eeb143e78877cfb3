from jaxppo.models import shapes


def test_shapes_of_the_families():
    gpt2, llama = shapes.gpt2(), shapes.llama(vocab_size=100)
    assert (gpt2.vocab_size, gpt2.width, gpt2.num_layers, gpt2.head_dim, gpt2.mlp_width) == (
        50257,
        768,
        12,
        64,
        3072,
    )
    assert (gpt2.positions, gpt2.norm, gpt2.gated, gpt2.qkv_bias, gpt2.tied) == (
        "learned",
        "layer",
        False,
        True,
        True,
    )
    assert (llama.head_dim, llama.num_heads, llama.num_kv_heads) == (8, 4, 2)  # width 32 / 4 heads
    assert (llama.positions, llama.norm, llama.gated, llama.qkv_bias, llama.tied) == (
        "rope",
        "rms",
        True,
        False,
        True,
    )
