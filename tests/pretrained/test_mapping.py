"""Names, layout and shapes of checkpoints in our tree."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxppo import pretrained
from jaxppo.errors import PretrainedError
from jaxppo.models import transformer
from jaxppo.models.shapes import gpt2, llama
from jaxppo.pretrained import mapping
from jaxppo.pretrained.tiny import tiny_model

LLAMA = llama(vocab_size=8, width=4, num_layers=1, num_heads=2, num_kv_heads=1)
GPT2 = gpt2(vocab_size=8, width=4, num_layers=1, num_heads=2, max_length=5)


def number(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def llama_tensors(prefix: str = "model.") -> dict[str, np.ndarray]:
    layer = {
        "input_layernorm": number(4),
        "self_attn.q_proj": number(4, 4),
        "self_attn.k_proj": number(2, 4),
        "self_attn.v_proj": number(2, 4),
        "self_attn.o_proj": number(4, 4),
        "post_attention_layernorm": number(4),
        "mlp.gate_proj": number(12, 4),
        "mlp.up_proj": number(12, 4),
        "mlp.down_proj": number(4, 12),
    }
    top = {"embed_tokens.weight": number(8, 4), "norm.weight": number(4)}
    return {
        prefix + name: t
        for name, t in (top | {f"layers.0.{n}.weight": t for n, t in layer.items()}).items()
    }


def gpt2_tensors() -> dict[str, np.ndarray]:
    layer = {
        "ln_1.weight": number(4),
        "ln_1.bias": number(4),
        "ln_2.weight": number(4),
        "ln_2.bias": number(4),
        "attn.c_attn.weight": number(4, 12),
        "attn.c_attn.bias": number(12),
        "attn.c_proj.weight": number(4, 4),
        "attn.c_proj.bias": number(4),
        "mlp.c_fc.weight": number(4, 16),
        "mlp.c_fc.bias": number(16),
        "mlp.c_proj.weight": number(16, 4),
        "mlp.c_proj.bias": number(4),
        "attn.bias": number(1, 1, 5, 5),
    }
    top = {
        "wte.weight": number(8, 4),
        "wpe.weight": number(5, 4),
        "ln_f.weight": number(4),
        "ln_f.bias": number(4),
    }
    return top | {f"h.0.{name}": tensor for name, tensor in layer.items()}


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_llama_linear_layers_are_transposed(prefix):
    params = mapping.from_checkpoint("llama", LLAMA, llama_tensors(prefix))
    assert set(params) == {"embed", "layers_0", "final_norm"}
    # [out, in] = [2, 4] becomes [in, out] = [4, 2]
    assert params["layers_0"]["attention"]["k"]["kernel"].tolist() == [
        [0, 4],
        [1, 5],
        [2, 6],
        [3, 7],
    ]
    assert params["layers_0"]["mlp"]["down"]["kernel"].shape == (12, 4)
    assert params["embed"]["embedding"].shape == (8, 4)  # a table, not a layer: as it is
    assert all(
        t.flags.c_contiguous and t.dtype == np.float32 for t in mapping.flatten(params).values()
    )


def test_the_four_norms_of_a_layer_of_gemma2():
    """post_attention_layernorm is elsewhere the norm before the MLP, here the one behind
    attention.
    """
    shape = dataclasses.replace(LLAMA, post_norms=True)
    theirs = {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    stored = llama_tensors() | {
        f"model.layers.0.{name}.weight": number(4) + i for i, name in enumerate(theirs.values())
    }
    params = mapping.from_checkpoint("gemma2", shape, stored)
    assert [float(params["layers_0"][name]["scale"][0]) for name in theirs] == [0, 1, 2, 3]
    again = mapping.to_checkpoint("gemma2", shape, params)
    assert all(np.array_equal(again[name], x) for name, x in stored.items())


def test_the_language_model_of_a_checkpoint_that_reads_images():
    """Under the names that transformers writes, and those of files on the hub."""
    mine = {name: number(2) for name in ("layers.0.input_layernorm.weight", "lm_head.weight")}
    seen = {"vision_tower.vision_model.head.bias": number(1)}
    seen["multi_modal_projector.mm_soft_emb_norm.weight"] = number(1)
    now = {f"model.language_model.{name}": x for name, x in mine.items() if "layers" in name}
    now |= {"lm_head.weight": number(2), **{f"model.{name}": x for name, x in seen.items()}}
    hub = {"language_model.model.layers.0.input_layernorm.weight": number(2), **seen}
    hub["language_model.lm_head.weight"] = number(2)
    for stored in (now, hub):
        assert mapping.language_model(stored).keys() == mine.keys()


def test_the_size_of_gemma3_1b():
    """The number of parameters that its page gives: 999,885,952."""
    shape = dataclasses.replace(
        LLAMA, vocab_size=262144, width=1152, num_layers=26, num_heads=4, num_kv_heads=1,
        head_dim=256, mlp_width=6912, qk_norm=True, post_norms=True,
    )  # fmt: skip
    # a layer: 2 · 1152 · (1024 + 256) attention, 3 · 1152 · 6912 MLP, 4 · 1152 + 2 · 256 norms
    layer, embedding = 2_949_120 + 23_887_872 + 5_120, 262_144 * 1152
    total = sum(int(np.prod(x)) for x in mapping.param_shapes(shape).values())
    assert total == 26 * layer + embedding + 1152 == 999_885_952


def test_gpt2_joint_projection_is_cut_in_three():
    params = mapping.from_checkpoint(
        "gpt2", GPT2, gpt2_tensors()
    )  # with a stored causal mask, which is passed over
    attention = params["layers_0"]["attention"]
    # row 0 of the joint kernel [4, 12] is 0..11: q has 0..3, k 4..7, v 8..11
    assert [attention[part]["kernel"][0].tolist() for part in "qkv"] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    assert attention["v"]["bias"].tolist() == [8, 9, 10, 11]
    assert (
        params["layers_0"]["mlp"]["up"]["kernel"].tolist() == number(4, 16).tolist()
    )  # stored as [in, out] already
    assert params["final_norm"]["bias"].shape == (4,) and params["positions"][
        "embedding"
    ].shape == (5, 4)


def test_tied_and_untied_heads():
    tensors = llama_tensors() | {"lm_head.weight": number(8, 4) + 1}
    assert "head" not in mapping.from_checkpoint(
        "llama", LLAMA, tensors
    )  # tied: a second copy is passed over
    untied = mapping.from_checkpoint("llama", dataclasses.replace(LLAMA, tied=False), tensors)
    assert untied["head"]["kernel"].tolist() == (number(8, 4) + 1).T.tolist()
    with pytest.raises(PretrainedError, match=r"no output layer \(lm_head.weight\)"):
        mapping.from_checkpoint("llama", dataclasses.replace(LLAMA, tied=False), llama_tensors())


def test_a_stored_head_that_differs_from_the_embedding_is_used():
    tensors = llama_tensors()
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    assert mapping.untie("llama", LLAMA, same) is LLAMA
    assert mapping.untie("llama", LLAMA, tensors) is LLAMA
    other = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    assert mapping.untie("llama", LLAMA, other) == dataclasses.replace(LLAMA, tied=False)


def test_biases_and_norms_of_qwen():
    config = dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True)
    layer = "model.layers.0.self_attn."
    extra = {f"{layer}{p}_proj.bias": number(4 if p == "q" else 2) for p in "qkv"}
    extra |= {f"{layer}{p}_norm.weight": number(2) for p in "qk"}
    attention = mapping.from_checkpoint("qwen3", config, llama_tensors() | extra)["layers_0"][
        "attention"
    ]
    assert attention["q_norm"]["scale"].tolist() == [0, 1] and attention["k"]["bias"].tolist() == [
        0,
        1,
    ]
    with pytest.raises(PretrainedError, match="do not ask for"):
        mapping.from_checkpoint("llama", LLAMA, llama_tensors() | extra)


def test_unknown_missing_and_misshapen_tensors():
    tensors = llama_tensors()
    with pytest.raises(PretrainedError, match=r"'score.weight'"):
        mapping.from_checkpoint("llama", LLAMA, tensors | {"score.weight": number(2, 4)})
    with pytest.raises(PretrainedError, match="lacks final_norm/scale"):
        mapping.from_checkpoint(
            "llama", LLAMA, {name: t for name, t in tensors.items() if name != "model.norm.weight"}
        )
    with pytest.raises(
        PretrainedError,
        match=r"embed/embedding has the shape \(7, 4\), but the settings ask for \(8, 4\)",
    ):
        mapping.from_checkpoint(
            "llama", LLAMA, tensors | {"model.embed_tokens.weight": number(7, 4)}
        )


def test_flatten_and_back():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert mapping.unflatten(mapping.flatten(tree)) == tree


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        GPT2,
        dataclasses.replace(LLAMA, tied=False, qkv_bias=True, qk_norm=True),
        dataclasses.replace(LLAMA, norm="rms_plus_one", qk_norm=True, post_norms=True),
    ],
)
def test_shapes_equal_those_of_the_model(config):
    made = jax.eval_shape(transformer.make(config).init, jax.random.key(0))
    made = {
        name: leaf.shape
        for name, leaf in mapping.flatten(made).items()
        if not name.startswith("value/")
    }
    assert made == mapping.param_shapes(config)


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["gru", "lstm", "convolution", "window"])
def test_other_kinds_are_saved_and_loaded(tmp_path, kind):
    shape, params, tokenizer = tiny_model(0, kind)
    pretrained.save(tmp_path / "a", shape, params, tokenizer)
    found = pretrained.load(tmp_path / "a")
    assert found.config == shape
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    with pytest.raises(PretrainedError, match="has the shape"):
        mapping.check_params(
            dataclasses.replace(shape, width=16, head_dim=16, mlp_width=32), mapping.flatten(params)
        )


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("base_model.model.lm_head.weight", "merge it into its base"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge it into its base"),
        ("_orig_mod.lm_head.weight", "save the model inside the wrapper"),
        ("module.lm_head.weight", "save the model inside the wrapper"),
        ("pretrained_model.lm_head.weight", "save the language model alone"),
        ("v_head.summary.weight", "save the language model alone"),
        ("score.weight", "give a causal language model"),
    ],
)
def test_tensors_of_other_libraries_say_what_to_do(name, cure):
    with pytest.raises(PretrainedError) as caught:
        mapping.from_checkpoint("llama", LLAMA, llama_tensors() | {name: number(2, 4)})
    assert repr(name) in str(caught.value) and cure in str(caught.value)
