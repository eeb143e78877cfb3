from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import models
from jaxppo.models import attention, lora

LLAMA, GPT2 = replace(toys.LLAMA, num_layers=2), replace(toys.GPT2, num_layers=2)
SHAPES = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "qwen2": replace(LLAMA, qkv_bias=True, tied=False),
    "qwen3": replace(LLAMA, qk_norm=True, rope_theta=1e6),
    "llama3": replace(LLAMA, rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    "mistral": replace(LLAMA, window=3, num_kv_heads=1),
    "smollm3": replace(LLAMA, no_rope=(1,)),
    "gemma2": toys.GEMMA2,
    "gemma3": toys.GEMMA3,
    "mixed windows": replace(LLAMA, window=3, no_window=(0,), no_rope=(0,)),
}


FAST = ("llama", "gpt2")


@pytest.fixture(
    scope="module",
    params=[x if x in FAST else pytest.param(x, marks=pytest.mark.ci) for x in SHAPES],
)
def toy(request):
    return toys.make(SHAPES[request.param])


@pytest.fixture(scope="module")
def whole(toy):
    """Logits and values of a full forward pass over ragged, left-padded rows of 10 slots."""
    prompts = toys.ragged([10, 7, 4, 1], 10)
    return prompts, *forward(toy, prompts.tokens, prompts.mask)


@cache
def program(model):
    def run(params, tokens, mask, cache=None):
        hidden, cache = model.apply(params, tokens, mask, cache=cache)
        return model.logits(params, hidden), model.value(params, hidden), cache

    return jax.jit(run)


def forward(toy, tokens, mask):
    return program(toy.model)(toy.params, tokens, mask)[:2]


@pytest.mark.ci
@pytest.mark.parametrize(
    "pieces", [[1] * 10, [6, 1, 1, 1, 1], [4, 3, 3]], ids=["one by one", "prefill", "several"]
)
def test_cached_decoding_equals_the_full_forward_pass(toy, whole, pieces):
    prompts, logits, values = whole
    cache, start = toy.model.init_cache(4, 12), 0  # longer than needed: empty slots are not seen
    for n in pieces:
        part = np.s_[:, start : start + n]
        on = np.asarray(prompts.mask[part])
        got, value, cache = program(toy.model)(
            toy.params, prompts.tokens[part], prompts.mask[part], cache
        )
        np.testing.assert_allclose(np.asarray(got)[on], np.asarray(logits[part])[on], atol=5e-5)
        np.testing.assert_allclose(np.asarray(value)[on], np.asarray(values[part])[on], atol=5e-5)
        start += n
    assert int(cache.filled) == 10
    np.testing.assert_array_equal(cache.attend[:, :10], prompts.mask)


def test_padding_has_no_effect(toy, whole):
    """Three more slots on the left, with any tokens in them, and two on the right."""
    prompts, logits, _ = whole
    tokens = jnp.pad(prompts.tokens, ((0, 0), (3, 2)), constant_values=6)
    got, _ = forward(toy, tokens, jnp.pad(prompts.mask, ((0, 0), (3, 2))))
    np.testing.assert_allclose(got[:, 3:-2][prompts.mask], logits[prompts.mask], atol=2e-5)


def test_attention_in_blocks_has_no_effect(toy, whole, monkeypatch):
    """Ten slots in blocks of four, four and two queries."""
    prompts, logits, _ = whole
    monkeypatch.setattr(attention, "LEAST_BLOCK", 3)
    assert attention.block_ends(10) == (4, 8, 10)
    run = jax.jit(lambda params, tokens, mask: toy.model.apply(params, tokens, mask)[0])
    own = toy.model.logits(toy.params, run(toy.params, prompts.tokens, prompts.mask))
    np.testing.assert_allclose(own[prompts.mask], logits[prompts.mask], atol=2e-5)


def test_causality(toy, whole):
    prompts, logits, _ = whole
    later, _ = forward(toy, prompts.tokens.at[:, 6].set(12 - prompts.tokens[:, 6]), prompts.mask)
    changed = (np.abs(np.asarray(later - logits)).max(-1) > 1e-4) & np.asarray(prompts.mask)
    assert not changed[:, :6].any()
    assert changed[:3, 6].all()
    # each of two layers carries it window − 1 tokens further
    reach = 6 + 2 * ((toy.config.window or 10) - 1) + 10 * len(toy.config.no_window)
    assert not changed[:, reach + 1 :].any()
    assert changed[:3, 7].all()


@pytest.mark.ci
def test_every_parameter_has_a_gradient(toy, whole):
    """Every parameter is used, and all gradients are finite although some slots attend to
    nothing.
    """
    prompts, _, _ = whole

    def total(params):
        hidden, _ = toy.model.apply(params, prompts.tokens, prompts.mask)
        logprobs = jax.nn.log_softmax(toy.model.logits(params, hidden))
        picked = logprobs[..., 3] + toy.model.value(params, hidden)
        return jnp.where(prompts.mask, jnp.sin(picked), 0.0).sum()

    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(total))(toy.params)):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(g).all(), name
        # A key's bias shifts all scores of a query alike, and without rotation softmax does not see
        # it.
        unseen = name.endswith("['k']['bias']") and toy.config.positions == "learned"
        assert np.abs(g).max() > (-1 if unseen else 1e-7), name


def test_head_is_the_matrix_behind_the_logits(toy):
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16)), jnp.float32)
    head = toy.model.head(toy.params)
    assert head.shape == (toys.VOCAB, 16)
    cap = toy.config.logit_cap or 1e4
    want = cap * np.tanh(hidden @ head.T / cap)
    np.testing.assert_allclose(toy.model.logits(toy.params, hidden), want, atol=1e-5)


def test_two_tokens_by_hand():
    """Two tokens, one layer, by NumPy: RMSNorm, rotary attention with a shared key head, SwiGLU,
    tied head.
    """
    toy = toys.make(replace(toys.LLAMA, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), toy.params)
    tokens = [3, 7]
    norm = lambda x, s: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * s
    x = p["embed"]["embedding"][tokens]
    layer = p["layers_0"]
    h = norm(x, layer["attention_norm"]["scale"])
    q, k, v = (h @ layer["attention"][name]["kernel"] for name in "qkv")

    def turn(x, position):
        # θ^(−i / 2) for the two pairs (0, 2) and (1, 3)
        angle = position * np.array([1.0, 1e4**-0.5])
        a, b = x[:2], x[2:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
        )

    out = np.zeros((2, 8))
    for head in range(2):
        mine = slice(4 * head, 4 * head + 4)
        for t in range(2):
            scores = np.array([turn(q[t, mine], t) @ turn(k[s], s) / 2 for s in range(t + 1)])  # √4
            weights = np.exp(scores) / np.exp(scores).sum()
            out[t, mine] = weights @ v[: t + 1]
    x = x + out @ layer["attention"]["o"]["kernel"]
    h = norm(x, layer["mlp_norm"]["scale"])
    gate = h @ layer["mlp"]["gate"]["kernel"]
    x = (
        x
        + (gate / (1 + np.exp(-gate)) * (h @ layer["mlp"]["up"]["kernel"]))
        @ layer["mlp"]["down"]["kernel"]
    )
    want = norm(x, p["final_norm"]["scale"]) @ p["embed"]["embedding"].T
    got, _ = forward(toy, jnp.array([tokens]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(got[0], want, atol=2e-5)


@pytest.mark.ci
def test_bfloat16_is_near_float32(family, strict):
    wide, narrow = family, toys.make(family.config, "bfloat16")
    prompts = toys.prompts()
    one, other = (
        forward(toy._replace(params=wide.params), prompts.tokens, prompts.mask)[0]
        for toy in (wide, narrow)
    )
    assert other.dtype == jnp.float32  # sums, softmax and the residual stream
    difference = np.abs(np.asarray(one - other))[prompts.mask].max()
    assert 1e-5 < difference < 0.3  # logits of this size, 8 bits


@pytest.mark.ci
def test_initial_parameters():
    params = jax.jit(models.make(GPT2, lora=2).init)(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert not np.asarray(params["value"]["kernel"]).any()  # the critic starts at 0
    assert not np.asarray(params["layers_0"]["attention"]["q"]["lora_b"]).any()
    # adapters on q and v alone
    assert set(params["layers_0"]["attention"]["k"]) == {"kernel", "bias"}
    assert float(np.std(params["embed"]["embedding"])) == pytest.approx(0.02, rel=0.2)


@pytest.mark.ci
@pytest.mark.parametrize("on", ["q,v", "all"])
def test_new_adapters_change_nothing(on):
    plain, adapted = models.make(LLAMA), models.make(LLAMA, lora=2, lora_on=on)
    params = jax.jit(adapted.init)(jax.random.key(0))
    prompts = toys.prompts()
    trained, base = lora.split(params, lora.is_trained)
    one, _ = adapted.apply(params, prompts.tokens, prompts.mask)
    other, _ = plain.apply(base, prompts.tokens, prompts.mask)
    np.testing.assert_array_equal(one, other)
    # the reference: the same module, no adapters
    without, _ = adapted.apply(base, prompts.tokens, prompts.mask)
    np.testing.assert_array_equal(one, without)


@pytest.mark.ci
def test_a_cache_in_another_dtype(llama):
    cache = llama.model.init_cache(2, 8, jnp.bfloat16)
    assert {x.dtype for x in cache.keys} == {jnp.dtype("bfloat16")}
    prompts = toys.ragged([4, 3], 4)
    hidden, cache = llama.model.apply(llama.params, prompts.tokens, prompts.mask, cache=cache)
    assert {x.dtype for x in cache.keys} == {jnp.dtype("bfloat16")}
    whole, _ = llama.model.apply(llama.params, prompts.tokens, prompts.mask)
    np.testing.assert_allclose(hidden[prompts.mask], whole[prompts.mask], atol=0.1)
