"""Adapters as PEFT's tensors, and PEFT's adapters merged into a base. What PEFT itself
reads and computes is compared in tests/commands/export/test_export.py.
"""

import json

import jax
import numpy as np
import pytest
import toys

from jaxppo import models, pretrained
from jaxppo.errors import PretrainedError
from jaxppo.models import lora, shapes
from jaxppo.pretrained import mapping, peft, safetensors
from jaxppo.pretrained.tiny import byte_tokenizer

LLAMA = shapes.llama(
    vocab_size=257, width=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64
)
GPT2 = shapes.gpt2(vocab_size=257, width=16, num_layers=2, num_heads=4, max_length=64)
FAMILIES = {"llama": LLAMA, "gpt2": GPT2}


def network(family: str, on: str = "all", rank: int = 2):
    """(all its parameters, base, adapters) without value head; no parameter is 0."""
    params = toys.random_params(models.make(FAMILIES[family], lora=rank, lora_on=on))
    params.pop("value")
    trained, base = lora.split(params, lora.is_trained)
    return (jax.device_get(tree) for tree in (params, base, trained))


@pytest.mark.ci
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "on",
    ["all", "k,mlp", "down,q,k", *(pytest.param(x, marks=pytest.mark.slow) for x in ("q,v", "o"))],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_written_and_merged_are_folded_adapters(family, on, rslora):
    params, base, adapters = network(family, on, rank=4)
    about, tensors = peft.from_run(family, FAMILIES[family], adapters, alpha=6.0, rslora=rslora)
    got = peft.merge(family, base, about, tensors)
    # the scale is 6 / 4, or 6 / √4 = 12 / 4
    want = lora.fold(params, alpha=12.0 if rslora else 6.0)
    toys.assert_close(got, want, atol=1e-5)
    assert about["use_rslora"] == rslora


@pytest.mark.ci
def test_settings_of_adapters_on_every_layer():
    """GPT-2's joint matrix has the rank of q, k and v, and α / r must stay: 3 · 2 and 3 · 8."""
    _, _, adapters = network("gpt2")
    about, tensors = peft.from_run("gpt2", GPT2, adapters, alpha=8.0, rslora=False)
    others = ["attn.c_proj", "c_fc", "mlp.c_proj"]
    assert about == {
        "r": 6,
        "lora_alpha": 24,
        "rank_pattern": dict.fromkeys(others, 2),
        "alpha_pattern": dict.fromkeys(others, 8),
        "use_rslora": False,
        "target_modules": ["attn.c_proj", "c_attn", "c_fc", "mlp.c_proj"],
        "fan_in_fan_out": True,
    }
    start = "base_model.model.transformer.h.1"
    assert tensors[f"{start}.attn.c_attn.lora_A.weight"].shape == (6, 16)
    assert tensors[f"{start}.attn.c_attn.lora_B.weight"].shape == (48, 6)
    assert tensors[f"{start}.mlp.c_proj.lora_A.weight"].shape == (2, 64)
    _, _, adapters = network("llama")
    about, tensors = peft.from_run("llama", LLAMA, adapters, alpha=8.0, rslora=False)
    assert (about["r"], about["lora_alpha"], about["rank_pattern"]) == (2, 8, {})
    assert about["target_modules"] == [
        f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")
    ]
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (16, 2)


def test_an_adapter_of_something_else_is_refused_by_name():
    pair = {"lora_a": np.ones((2, 1), np.float32), "lora_b": np.ones((1, 2), np.float32)}
    with pytest.raises(PretrainedError, match="adapter of body/x cannot be exported"):
        peft.from_run("llama", LLAMA, {"body": {"x": pair}}, alpha=1.0, rslora=False)


def save_adapter(folder, family: str, **changes):
    """A base in `folder`/base and an adapter of all its layers; returns the merged weights."""
    params, base, adapters = network(family)
    about, tensors = peft.from_run(family, FAMILIES[family], adapters, alpha=8.0, rslora=True)
    pretrained.save(folder / "base", FAMILIES[family], base, byte_tokenizer())
    safetensors.write_file(folder / peft.WEIGHTS, tensors)
    (folder / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", **about, **changes}))
    return lora.fold(params, alpha=8.0 * 2**0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_loaded_merged_into_its_base(family, tmp_path):
    """Into the base beside it, and into one that it names."""
    want = save_adapter(tmp_path, family)
    toys.assert_close(pretrained.load(tmp_path).params, want, atol=1e-5)
    hashed = pretrained.weights_hash(str(tmp_path))
    (tmp_path / "base").rename(tmp_path / "other")
    assert pretrained.weights_hash(str(tmp_path)) != hashed  # which has the base in it
    stored = json.loads((tmp_path / peft.CONFIG).read_text())
    stored["base_model_name_or_path"] = str(tmp_path / "other")
    (tmp_path / peft.CONFIG).write_text(json.dumps(stored))
    toys.assert_close(pretrained.load(tmp_path).params, want, atol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "holds an adapter of None; merge it"),
        ({"use_dora": True}, "has use_dora set, which is not supported; merge it"),
        ({"bias": "all"}, "has bias set"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save set"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights pissa_niter_4 set"),
        ({"alpha_pattern": {"(a+)+": 1}}, "is not a plain name"),
        ({"alpha_pattern": ["q_proj"]}, "has alpha_pattern set"),
        ({"lora_alpha": "8"}, "has lora_alpha '8' and rank 2"),
    ],
)
def test_another_kind_of_adapter_is_one_line(changes, words, tmp_path):
    save_adapter(tmp_path, "llama", **changes)
    with pytest.raises(PretrainedError, match=words) as caught:
        pretrained.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (2, 16), "is not one of a pair"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (2, 16), "is not one of a pair"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", (48, 3), "is not one of"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", (9, 2), r"\(48, 16\)|shape"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, shape, words, tmp_path):
    save_adapter(tmp_path, "llama")
    tensors = safetensors.read_file(tmp_path / peft.WEIGHTS)
    tensors[name] = np.ones(shape, np.float32)
    safetensors.write_file(tmp_path / peft.WEIGHTS, tensors)
    with pytest.raises(PretrainedError, match=words) as caught:
        pretrained.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_layers_that_the_base_lacks_are_named(tmp_path):
    """Experts, and an output layer that is tied to the embedding."""
    for module in ("model.layers.0.mlp.experts.3.up_proj", "lm_head"):
        pair = {"A": np.ones((2, 16), np.float32), "B": np.ones((48, 2), np.float32)}
        tensors = {f"base_model.model.{module}.lora_{x}.weight": y for x, y in pair.items()}
        _, base, _ = network("llama")
        with pytest.raises(PretrainedError, match=f"has {module}, .* does not exist in its base"):
            peft.merge("llama", base, {"lora_alpha": 2}, tensors)


def test_an_adapter_of_the_body_alone():
    """As PEFT names it for AutoModel. Scale 3 / 1; B A = (1, 2, ...)ᵀ (1, ..., 1)."""
    _, base, _ = network("llama")
    pair = {"A": np.ones((1, 16), np.float32), "B": np.arange(16, dtype=np.float32)[:, None]}
    name = "layers.1.self_attn.q_proj"
    tensors = {f"base_model.model.{name}.lora_{x}.weight": y for x, y in pair.items()}
    got = mapping.flatten(peft.merge("llama", base, {"lora_alpha": 3}, tensors))
    for path, x in mapping.flatten(base).items():
        own = 3.0 * np.arange(16)[None] if path == "layers_1/attention/q/kernel" else 0.0
        np.testing.assert_allclose(got[path], x + own, atol=1e-5)
