"""Exports are read by PyTorch, by PEFT's rules and by jaxppo, and give the same numbers.

The runs have random weights and adapters that are not zero; nothing is trained.
"""

import dataclasses
import json
import shlex
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toys
from hostile import TEXTS, Read

from jaxppo import commands, models, ppo, pretrained
from jaxppo.commands import export
from jaxppo.commands.export import ExportOptions, folder
from jaxppo.config import RunConfig
from jaxppo.data.folders import complete_folder
from jaxppo.data.prompts import encode
from jaxppo.errors import PretrainedError, UserError
from jaxppo.models import lora, shapes
from jaxppo.pretrained import mapping, settings
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files, load, sampler
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.settings import to_dict

LLAMA = shapes.llama(
    vocab_size=257, width=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64
)
GPT2 = shapes.gpt2(vocab_size=257, width=16, num_layers=2, num_heads=4, max_length=64)
GEMMA2 = dataclasses.replace(
    LLAMA,
    norm="rms_plus_one",
    post_norms=True,
    scaled_embedding=True,
    score_cap=0.5,
    logit_cap=2.0,
    activation="gelu_tanh",
)
GEMMA3 = dataclasses.replace(
    GEMMA2, score_cap=None, logit_cap=None, qk_norm=True, window=4, window_theta=10.0
)
SHAPES = {
    "llama": LLAMA,
    "llama untied": dataclasses.replace(LLAMA, tied=False),
    "gpt2": GPT2,
    "gpt2 untied": dataclasses.replace(GPT2, tied=False),
}
MORE = {  # every other point of the families' space
    "biases": dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True),
    "mlp biases": dataclasses.replace(LLAMA, mlp_bias=True),
    "wide heads": dataclasses.replace(LLAMA, head_dim=8),
    "frequency": dataclasses.replace(LLAMA, rope_theta=5e5, norm_eps=1e-6),
    "llama 3": dataclasses.replace(LLAMA, rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    "gelu": dataclasses.replace(LLAMA, activation="gelu_tanh"),
    "mistral": dataclasses.replace(LLAMA, window=4),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "qwen2 window": dataclasses.replace(LLAMA, qkv_bias=True, window=4),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True),
    "qwen3 biases": dataclasses.replace(
        LLAMA, qk_norm=True, qkv_bias=True, out_bias=True, tied=False
    ),
    "qwen3 window": dataclasses.replace(LLAMA, qk_norm=True, window=4),
    "qwen2 window in some layers": dataclasses.replace(
        LLAMA, qkv_bias=True, window=4, no_window=(1,)
    ),
    "smollm3": dataclasses.replace(LLAMA, no_rope=(1,)),
    "smollm3 biases, window": dataclasses.replace(
        LLAMA, no_rope=(1,), window=4, no_window=(0,), qkv_bias=True, out_bias=True
    ),
    "gemma2": dataclasses.replace(GEMMA2, window=4, no_window=(1,), query_size=3),
    "gemma2 biases": dataclasses.replace(GEMMA2, qkv_bias=True, out_bias=True, tied=False),
    "gemma3": dataclasses.replace(
        GEMMA3, no_window=(1,), query_size=3, rope_scaling=(8.0,), tied=False
    ),
    "gemma3 all windows, logit cap": dataclasses.replace(GEMMA3, logit_cap=2.0),
    "gemma3 rotating alike": dataclasses.replace(
        GEMMA3, no_window=(1,), window_theta=None, rope_scaling=(8.0,)
    ),
    "gemma3 no window": dataclasses.replace(GEMMA3, window=None, window_theta=None, query_size=16),
    "linear": dataclasses.replace(LLAMA, rope_scaling=(8.0,)),
    "gpt2 exact gelu": dataclasses.replace(GPT2, activation="gelu", mlp_width=40),
}
SIZES = RunConfig(batch_size=4, prompt_length=8, response_length=6, minibatches=2)
RUN = dataclasses.replace(SIZES, lora=2, lora_alpha=8.0, temperature=0.7, top_p=0.9)
HASH = "0123456789abcdef"
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 5}
UNICODE = "Hi 5€ naïve 漢字 🙂  two spaces\tand\nlines <|endoftext|> é (e + accent)"
SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123456789"  # no token of anybody's


@cache
def weights(shape) -> dict:
    """Random ones, none at a special value."""
    rng = np.random.default_rng(0)
    around = lambda name: 1.0 if name.endswith("scale") else 0.0
    flat = {
        n: (around(n) + 0.2 * rng.normal(size=s)).astype(np.float32)
        for n, s in mapping.param_shapes(shape).items()
    }
    return mapping.unflatten(flat)


def moved(tree):
    """The tree, every leaf of it changed."""
    leaves, form = jax.tree.flatten(tree)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        form,
        [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in jax.device_get(leaves)],
    )


def make_run(
    root: Path, shape=LLAMA, *, tokenizer: Tokenizer | None = None, scores=(None,), **changes
) -> Path:
    """A run's folder with a checkpoint for each score, and its numbers; each state is moved once
    more.
    """
    root.mkdir(exist_ok=True)
    if not (root / "start").exists():
        pretrained.save(root / "start", shape, weights(shape), tokenizer or byte_tokenizer())
    place = root / "run"
    place.mkdir()
    c = dataclasses.replace(RUN, model=str(root / "start"), name="run", runs=str(root), **changes)
    c, policy = load.load_policy(c)
    state = ppo.init_state(c, policy.params, policy.frozen, jax.random.key(0))
    checkpoints = Checkpoints(
        place / "checkpoints", about={"config": HASH, "versions": {"jax": "9.9"}}, keep_every=1
    )
    for step, score in enumerate(scores, 1):
        state = state.replace(step=jnp.asarray(step, jnp.int32), params=moved(state.params))
        checkpoints.save(state, score=score)
    checkpoints.close()
    files.write_config(place, to_dict(c))
    rows = [
        {"step": i, "reward": i / 2, "kl": 0.25 * i, "tokens_per_second": 10.0}
        for i in range(1, len(scores) + 1)
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "command.txt").write_text("python experiments/sentiment.py --steps 2\n")
    return place


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The run of a shape, made once."""
    return cache(lambda name: make_run(tmp_path_factory.mktemp("runs"), SHAPES[name]))


@cache
def found_in(run: Path) -> export.Exported:
    return export.restore(run, "best")


def exported(run: Path, folder: Path, **options) -> Path:
    """By the command's own function."""
    export.export(ExportOptions(run, folder, **options))
    return folder


def written(run: Path, folder: Path, **options) -> Path:
    """The same of a run that has been read already."""
    with complete_folder(folder) as whole:
        export.write(whole, found_in(run), ExportOptions(run, folder, **options))
    return folder


def flat(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in mapping.flatten(tree).items()}


def assert_same(want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> None:
    """Bit by bit."""
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def language_model(run: Path) -> dict[str, np.ndarray]:
    found = found_in(run)
    return flat(load.export_params(found.config, found.policy, found.state))


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Rows of 12, 7, 3 and 1 tokens, padded on the left."""
    tokens = np.random.default_rng(2).integers(0, 257, (4, 12)).astype(np.int32)
    return tokens, np.arange(12)[None] >= 12 - np.asarray([12, 7, 3, 1])[:, None]


def our_hidden(model, params, tokens, mask):
    """(logits, values or None) of ours; NumPy."""

    @jax.jit
    def run(params, tokens, mask):
        hidden, _ = model.apply(params, tokens, mask)
        return model.logits(params, hidden), model.value(
            params, hidden
        ) if "value" in params or "critic" in params else None

    return jax.device_get(run(params, tokens, mask))


def torch_hidden(model, tokens, mask):
    """(logits, last hidden states) in PyTorch, as `generate` would ask for them."""
    import torch

    as_tensor = lambda x: torch.tensor(np.asarray(x, np.int64))
    positions = as_tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    with torch.no_grad():
        out = model(
            as_tensor(tokens),
            attention_mask=as_tensor(mask),
            position_ids=positions,
            output_hidden_states=True,
        )
    return out.logits.float().numpy(), out.hidden_states[-1].float().numpy()


def in_torch(folder: Path, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="PyTorch comes with the extra `parity`")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert (
        not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    )
    return model


@pytest.mark.ci
@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_values_equal_in_pytorch(name, run_of, tmp_path):
    """jaxppo applies the adapters, PyTorch has them merged; the value head is in a file."""
    torch = pytest.importorskip("torch", reason="PyTorch comes with the extra `parity`")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    run = run_of(name)
    folder = written(run, tmp_path / "out")
    tokens, mask = prompts()
    theirs, last = torch_hidden(in_torch(folder), tokens, mask)
    found = found_in(run)
    params = lora.merge(found.policy.frozen["base"], found.state.params)
    ours, values = our_hidden(found.policy.model, params, tokens, mask)
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=2e-5)
    assert np.abs(theirs).max() > 1
    plain, _ = our_hidden(found.policy.model, found.policy.frozen["base"], tokens, mask)
    assert np.abs(plain - theirs)[mask].max() > 1e-2  # the adapters do something
    head = safetensors_torch.load_file(folder / "value_head.safetensors")
    value = torch.nn.functional.linear(
        torch.tensor(last), head["value.weight"], head["value.bias"]
    )[..., 0].numpy()
    np.testing.assert_allclose(values[mask], value[mask], atol=2e-5)
    assert np.abs(value).max() > 0.1


@pytest.mark.ci
@pytest.mark.parametrize("name", [*SHAPES, *MORE])
def test_every_shape_in_pytorch_and_back(name, tmp_path):
    """PyTorch's logits equal ours, and reading the files back is exact, for every shape."""
    shape = (SHAPES | MORE)[name]
    folder.write_model(
        tmp_path, shape, weights(shape), byte_tokenizer(), dtype="float32", sampling=SAMPLING
    )
    again = pretrained.load(tmp_path)
    assert again.config == shape
    assert again.tokenizer.settings() == byte_tokenizer().settings()
    want, got = flat(weights(shape)), flat(again.params)
    assert_same(want, got)
    tokens, mask = prompts()
    theirs, _ = torch_hidden(in_torch(tmp_path), tokens, mask)
    ours, _ = our_hidden(models.make(shape), weights(shape), tokens, mask)
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=2e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_export_and_import_are_exact(name, run_of, tmp_path):
    run = run_of(name)
    folder = written(run, tmp_path / "out")
    again, want = pretrained.load(folder), language_model(run)
    got = flat(again.params)
    assert again.config == SHAPES[name]
    assert_same(want, got)
    # a tied head is not there twice; the trained matrices are not those of the start
    stored = pretrained.safetensors.read_folder(folder)
    assert ("lm_head.weight" in stored) == ("untied" in name)
    assert (
        got["layers_0/attention/q/kernel"]
        != weights(SHAPES[name])["layers_0"]["attention"]["q"]["kernel"]
    ).any()


@pytest.mark.parametrize("name", ["llama", "gpt2 untied"])
def test_bfloat16(name, run_of, tmp_path):
    run = run_of(name)
    folder = written(run, tmp_path / "out", dtype="bfloat16")
    exact, got = language_model(run), flat(pretrained.load(folder).params)
    rounded = {k: x.astype(ml_dtypes.bfloat16).astype(np.float32) for k, x in exact.items()}
    assert_same(rounded, got)
    assert any((got[k] != x).any() for k, x in exact.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    whole = written(run, tmp_path / "whole")
    sizes = [(x / "model.safetensors").stat().st_size for x in (folder, whole)]
    assert sizes[0] < 0.6 * sizes[1]
    model = in_torch(folder)
    assert str(model.dtype) == "torch.bfloat16"
    tokens, mask = prompts()
    theirs, _ = torch_hidden(in_torch(folder, dtype="float32"), tokens, mask)
    ours, _ = our_hidden(models.make(SHAPES[name]), mapping.unflatten(rounded), tokens, mask)
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=2e-5)


def merged_by_hand(folder: Path) -> dict[str, np.ndarray]:
    """PEFT's rule (https://huggingface.co/docs/peft/developer_guides/checkpoint):
    `base_model.model.` before the name, and W + lora_alpha / r * B A for a weight [out in], its
    transpose where fan_in_fan_out says so.
    """
    about = json.loads((folder / "adapter_config.json").read_text())
    own = pretrained.safetensors.read_folder(folder / "base")
    deltas = pretrained.safetensors.read_file(folder / "adapter_model.safetensors")
    pairs = {
        name.removesuffix(".lora_A.weight") for name in deltas if name.endswith(".lora_A.weight")
    }
    assert set(deltas) == {f"{name}.lora_{x}.weight" for name in pairs for x in "AB"}
    for name in pairs:
        a, b = deltas[f"{name}.lora_A.weight"], deltas[f"{name}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == about["r"]
        assert name.split(".")[-1] in about["target_modules"]
        delta = about["lora_alpha"] / about["r"] * (b @ a)
        own[f"{name.removeprefix('base_model.model.')}.weight"] += (
            delta.T if about["fan_in_fan_out"] else delta
        )
    return own


@pytest.mark.parametrize("name", SHAPES)
def test_an_adapter_equals_the_merged_weights(name, run_of, tmp_path):
    run = run_of(name)
    folder = written(run, tmp_path / "adapter", adapter=True)
    want = pretrained.safetensors.read_folder(written(run, tmp_path / "merged"))
    got = merged_by_hand(folder)
    assert want.keys() == got.keys()
    for key, x in want.items():
        np.testing.assert_allclose(got[key], x, atol=1e-6)
    assert not (folder / "model.safetensors").exists()
    about = json.loads((folder / "adapter_config.json").read_text())
    assert (about["peft_type"], about["task_type"], about["bias"]) == ("LORA", "CAUSAL_LM", "none")
    names = sorted(pretrained.safetensors.read_file(folder / "adapter_model.safetensors"))
    if "gpt2" in name:  # 8 / 2 = 16 / 4: the joint matrix has the ranks of q and v
        assert (about["r"], about["lora_alpha"], about["fan_in_fan_out"]) == (4, 16, True)
        assert names[0] == "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
        k = pretrained.safetensors.read_file(folder / "adapter_model.safetensors")[names[1]][16:32]
        assert not k.any()  # nothing for the keys
    else:
        assert (about["r"], about["lora_alpha"], about["fan_in_fan_out"]) == (2, 8, False)
        assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_itself_reads_an_adapter(name, run_of, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT comes with the extra `parity`")
    run = run_of(name)
    folder = written(run, tmp_path / "adapter", adapter=True)
    tokens, mask = prompts()
    want, _ = torch_hidden(in_torch(written(run, tmp_path / "merged")), tokens, mask)
    model = peft.PeftModel.from_pretrained(in_torch(folder / "base"), folder)
    got, _ = torch_hidden(model.eval(), tokens, mask)
    np.testing.assert_allclose(got[mask], want[mask], atol=2e-5)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "on"),
    [
        ("llama", "all"),
        ("gpt2", "k,o,down"),
        pytest.param("llama", "k,o,down", marks=pytest.mark.slow),
        pytest.param("gpt2", "all", marks=pytest.mark.slow),
    ],
)
def test_adapters_on_other_layers(name, on, tmp_path):
    """Rank-stabilised: ours applied, ours merged, PEFT's, and PEFT's read back are the same."""
    peft = pytest.importorskip("peft", reason="PEFT comes with the extra `parity`")
    run = make_run(tmp_path / "x", SHAPES[name], lora_on=on, rslora=True)
    adapter = written(run, tmp_path / "adapter", adapter=True)
    tokens, mask = prompts()
    found = found_in(run)
    params = lora.merge(found.policy.frozen["base"], found.state.params)
    want, _ = our_hidden(found.policy.model, params, tokens, mask)
    merged, back = language_model(run), pretrained.load(adapter)
    assert back.config == SHAPES[name]
    for weights_of in (mapping.unflatten(merged), back.params):
        ours, _ = our_hidden(models.make(SHAPES[name]), weights_of, tokens, mask)
        np.testing.assert_allclose(ours[mask], want[mask], atol=2e-5)
    model = peft.PeftModel.from_pretrained(in_torch(adapter / "base"), adapter)
    got, _ = torch_hidden(model.eval(), tokens, mask)
    np.testing.assert_allclose(got[mask], want[mask], atol=2e-5)
    plain, _ = our_hidden(found.policy.model, found.policy.frozen["base"], tokens, mask)
    assert np.abs(plain - want)[mask].max() > 1e-2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": "all-linear", "rank_pattern": {"v_proj": 3}}),
        ("gpt2", {"target_modules": "all-linear", "alpha_pattern": {"c_attn": 5}}),
        ("gpt2 untied", {"target_modules": ["c_attn", "mlp.c_proj"], "use_rslora": True}),
    ],
)
def test_an_adapter_that_peft_wrote_is_read(name, options, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT comes with the extra `parity`")
    torch = pytest.importorskip("torch")
    base, shape = tmp_path / "base", SHAPES[name]
    base.mkdir()
    folder.write_model(
        base, shape, weights(shape), byte_tokenizer(), dtype="float32", sampling=SAMPLING
    )
    settings_ = peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(in_torch(base), settings_)
    torch.manual_seed(0)
    for key, x in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(x, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    tokens, mask = prompts()
    want, _ = torch_hidden(model.eval(), tokens, mask)
    read = pretrained.load(tmp_path / "adapter")  # which names its base
    got, _ = our_hidden(models.make(shape), read.params, tokens, mask)
    np.testing.assert_allclose(got[mask], want[mask], atol=2e-5)
    plain, _ = our_hidden(models.make(shape), weights(shape), tokens, mask)
    assert np.abs(plain - want)[mask].max() > 1e-2


def test_an_adapter_names_its_base_on_the_hub(tmp_path, monkeypatch):
    run = make_run(tmp_path / "x")
    start = pretrained.load(tmp_path / "x" / "start")
    monkeypatch.setattr(load.pretrained, "load", lambda name: start)
    stored = json.loads((run / "config.json").read_text()) | {"model": "me/base@v1"}
    (run / "config.json").write_text(json.dumps(stored))
    folder = exported(run, tmp_path / "adapter", adapter=True)
    about = json.loads((folder / "adapter_config.json").read_text())
    assert (about["base_model_name_or_path"], about["revision"]) == ("me/base", "v1")
    assert not (folder / "base").exists()
    text = (folder / "README.md").read_text()
    assert 'base_model: "me/base"\n' in text and "library_name: peft\n" in text
    assert 'base = AutoModelForCausalLM.from_pretrained("me/base", revision="v1")' in text


@pytest.mark.ci
def test_scanned_layers_and_a_separate_critic(tmp_path):
    """Scanned layers become one tensor each; the critic's file has its head and its body."""
    run = make_run(tmp_path / "x", scan_layers=True, critic="separate")
    folder = written(run, tmp_path / "out")
    assert_same(language_model(run), flat(pretrained.load(folder).params))
    by_hand = merged_by_hand(written(run, tmp_path / "adapter", adapter=True))
    for key, x in pretrained.safetensors.read_folder(folder).items():
        np.testing.assert_allclose(by_hand[key], x, atol=1e-6)
    critic = pretrained.safetensors.read_file(folder / "value_head.safetensors")
    head = [critic.pop(name) for name in ("value.weight", "value.bias")]
    body = mapping.from_checkpoint("llama", LLAMA, critic)
    tokens, mask = prompts()
    hidden, _ = jax.jit(models.make(LLAMA).apply)(body, tokens, mask)
    found = found_in(run)
    params = lora.merge(found.policy.frozen["base"], found.state.params)
    _, want = our_hidden(found.policy.model, params, tokens, mask)
    got = (np.asarray(hidden) @ head[0].T)[..., 0] + head[1]
    np.testing.assert_allclose(got[mask], want[mask], atol=2e-5)
    assert np.abs(want).max() > 0.1


def test_every_weight_trained_and_no_critic(tmp_path):
    run = make_run(tmp_path / "x", lora=0, value_loss="none")
    folder = written(run, tmp_path / "out")
    assert not (folder / "value_head.safetensors").exists()
    assert_same(language_model(run), flat(pretrained.load(folder).params))
    with pytest.raises(UserError, match="no adapters.*leave --adapter out"):
        written(run, tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.ci
def test_the_tokenizer_and_greedy_text_of_transformers(tmp_path):
    """Unicode there and back with the same ids; special tokens and chat format; `generate` goes on
    as our sampler does.
    """
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch", reason="PyTorch comes with the extra `parity`")
    own = byte_tokenizer()
    own.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    run = make_run(tmp_path / "x", tokenizer=own)
    folder = written(run, tmp_path / "out")
    found = transformers.AutoTokenizer.from_pretrained(folder)
    assert found(UNICODE).input_ids == own.encode(UNICODE)
    assert found.decode(own.encode(UNICODE)) == UNICODE
    assert (found.eos_token_id, found.bos_token_id, found.pad_token_id) == (256, 256, 256)
    assert (
        found.apply_chat_template([{"role": "user", "content": "ö"}], tokenize=False) == "<user>ö"
    )
    assert pretrained.load(folder).tokenizer.settings() == own.settings()

    model = in_torch(folder)
    asked = model.generation_config
    assert (asked.temperature, asked.top_p, asked.top_k, asked.max_new_tokens, asked.do_sample) == (
        0.7,
        0.9,
        0,
        6,
        True,
    )
    texts = ["one and", "ö", "漢字"]
    batch = found(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = model.generate(**batch, do_sample=False, temperature=None, top_p=None, top_k=None)
    there = found_in(run)
    encoded = encode(texts, own, 8)
    ours = sampler.Sampler(there.config, there.policy, rows=3, greedy=True)(
        there.state, encoded, seed=0
    )
    cut = batch["input_ids"].shape[1]
    assert [
        row[: len(x.tokens)] for row, x in zip(theirs[:, cut:].tolist(), ours, strict=True)
    ] == [x.tokens for x in ours]


def test_the_best_checkpoint_or_the_newest(tmp_path, capsys):
    run = make_run(tmp_path / "x", scores=(0.5, 2.0, 1.0))
    kernels = {}
    for which, step in (("best", 2), ("newest", 3)):
        folder = exported(run, tmp_path / which, checkpoint=which)
        assert (
            f"written: {folder} (the {which} checkpoint, of step {step})" in capsys.readouterr().out
        )
        kernels[which] = pretrained.load(folder).params["layers_0"]["attention"]["q"]["kernel"]
    assert (kernels["best"] != kernels["newest"]).any()
    folder = exported(run, tmp_path / "first", checkpoint="1")
    assert f"written: {folder} (the checkpoint of step 1)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--checkpoint 4: .* best, newest, or one of 1, 2, 3"):
        exported(run, tmp_path / "fourth", checkpoint="4")
    assert not (tmp_path / "fourth").exists()


def test_the_average_of_the_weights_or_the_weights(tmp_path, capsys):
    """The states of this run move, and their average stays at the start."""
    run = make_run(tmp_path / "x", ema_decay=0.5, lora=0, value_loss="none")
    kernel = lambda folder: pretrained.load(folder).params["layers_0"]["attention"]["q"]["kernel"]
    start = kernel(tmp_path / "x" / "start")
    average = exported(run, tmp_path / "average")
    assert "of step 1, averaged with a decay of 0.5 a step)" in capsys.readouterr().out
    np.testing.assert_array_equal(kernel(average), start)
    raw = kernel(exported(run, tmp_path / "raw", raw=True))
    assert "averaged" not in capsys.readouterr().out
    _, _, state = load.restore(run, raw=True)
    np.testing.assert_array_equal(raw, state.params["layers_0"]["attention"]["q"]["kernel"])
    assert np.abs(raw - start).max() > 0.1
    toys.assert_same(load.restore(run)[2].params, state.statistics["average"])
    toys.assert_same(load.restore_best(run, state).params, state.statistics["average"])


def test_a_task(tmp_path):
    run = make_run(tmp_path / "x")
    run.rename(tmp_path / "x" / "policy")
    result = {
        "policy": {"bleu": 0.75},
        "supervised": {"bleu": 0.5},
        "gain": {"bleu": [0.25, 0.125, 0.375]},
        "test_rows": 8,
    }
    (tmp_path / "x" / "result.json").write_text(json.dumps(result))
    (tmp_path / "x" / "eval.json").write_text(
        json.dumps({"task": "t", "chrf": [0.5, 0.25, 0.625], "bad": [1], "pass@1": 0.5})
    )
    text = (exported(tmp_path / "x", tmp_path / "out") / "README.md").read_text()
    for line in (
        "| bleu (0 to 100) | test, gain | 0.25 \\[0.125, 0.375\\] |",
        "| bleu (0 to 100) | test, policy | 0.75 |",
        "| chrf | 0.500 | 0.250 | 0.625 |",
        "| pass&#64;1 | 0.500 | – | – |",
        "$ python experiments/sentiment.py --steps 2",
    ):
        assert line in text


def test_the_card_has_command_hash_metrics_and_limits(tmp_path):
    text = (
        exported(make_run(tmp_path / "x", scores=(1.0, 2.0)), tmp_path / "out") / "README.md"
    ).read_text()
    assert text.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- jaxppo\n---\n"
        "\n# run\n"
    )
    for words in (
        "$ python experiments/sentiment.py --steps 2",
        f"Hash of the run's settings: {HASH}",
        "the best checkpoint, of step 2",
        "| kl (nats a response) | training | 0.375 |",  # (.25 + .5) / 2
        "| reward (score a response) | training | 0.75 |",
        "prompts of at most 8 tokens and responses of at most 6",
        "temperature 0.7, top\\_k 0 (0 = all), top\\_p 0.9",
        "| lora\\_alpha | 16.0 | 8.0 |",
        "jax 9.9",
        "ppo: clipped ratios",
        "may exploit what that reward overlooks",
    ):
        assert words in text, words


def test_the_card_holds_no_secrets_and_hostile_text_is_inert(tmp_path):
    """Files of the run as somebody may have written them by hand."""
    markdown = pytest.importorskip("markdown_it")
    run = make_run(tmp_path / "x")
    commands = [
        f"jaxppo x --api-key {SECRET}",
        f"python a.py --note={SECRET}",
        "a https://me:pass1234@example.org",
        "b 'open",
    ]
    commands += [shlex.join(["c", text]) for text in TEXTS]
    (run / "command.txt").write_text("\n".join(commands), "utf-8", errors="replace")
    stored = json.loads((run / "config.json").read_text())
    extra = {"hub_token": "abcd1234", "note": f"see {SECRET}"} | {
        f"setting {i} {x[:99]}": x for i, x in enumerate(TEXTS)
    }
    (run / "config.json").write_text(json.dumps(stored | extra))
    (run / "eval.json").write_text(json.dumps({text: [0.5, None, "x"] for text in TEXTS}))
    text = (exported(run, tmp_path / "out") / "README.md").read_text("utf-8")
    for secret in (SECRET, "abcd1234", "pass1234"):
        assert secret not in text
    assert "--api-key '\\*\\*\\*'" in text or "--api-key '***'" in text
    body = text.split("---\n", 2)[2]
    seen = Read(
        markdown.MarkdownIt("commonmark", {"html": True})
        .enable(["table", "strikethrough"])
        .render(body)
    )
    assert seen.harmless(), seen.tags
    assert text.count("base_model") == 0  # only a hub's id is one
    listing = text.split("## Training")[1].split("\n```")[1]
    assert "$ c '<script>" in listing  # shown as it is
    (run / "eval.json").write_text("[" * 100_000)  # damaged: no reason to fail
    exported(run, tmp_path / "again")


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["gru", "lstm", "convolution", "window"])
def test_kinds_that_transformers_does_not_have(kind, tmp_path):
    shape = shapes.network(kind, vocab_size=257, width=16, num_layers=1)
    with pytest.raises(PretrainedError, match=f"no class for a {kind} policy") as error:
        settings.family_of(shape)
    assert "\n" not in str(error.value)
    if kind == "gru":
        params = {
            k: x
            for k, x in jax.device_get(models.make(shape).init(jax.random.key(0))).items()
            if k != "value"
        }
        pretrained.save(tmp_path / "x" / "start", shape, params, byte_tokenizer())
        run = make_run(tmp_path / "x", shape, lora=0)
        with pytest.raises(UserError, match="no class for a gru policy"):
            exported(run, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]  # nothing half written


def test_folders_that_exist_are_refused(tmp_path, monkeypatch):
    full, file, empty, link = (tmp_path / name for name in ("full", "file", "empty", "link"))
    full.mkdir()
    (full / "x").touch()
    file.touch()
    empty.mkdir()
    link.symlink_to(empty)
    for place in (full, file, link):
        with pytest.raises(UserError, match="exists and is not an empty folder") as error:
            exported(tmp_path / "no run", place)  # before anything is read
        assert "\n" not in str(error.value)
    monkeypatch.chdir(empty)
    with pytest.raises(UserError, match="no name of its own"):
        folder.check_free(Path("."))
    with pytest.raises(UserError, match="no run in"):
        exported(tmp_path / "no run", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_only_push_uses_the_hub_and_no_verb_takes_a_token():
    for verb in commands.VERBS:
        _, options = commands.load(verb)
        names = {field.name for field in dataclasses.fields(options)}
        assert not any(
            "token" in name and name not in ("max_tokens", "min_tokens", "tokens_per_microbatch")
            for name in names
        ), verb
    assert "huggingface_hub" not in Path(export.__file__).read_text()


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "x")
    monkeypatch.setattr(
        "sys.argv", ["jaxppo", "export", str(run), str(tmp_path / "out"), "--dtype", "bfloat16"]
    )
    commands.main()
    assert "model.safetensors" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and shown.err.startswith("error: ") and shown.out == ""
