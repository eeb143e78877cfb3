from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxppo import models, ppo
from jaxppo.config import RunConfig
from jaxppo.costs import compiled, memory
from jaxppo.errors import UserError
from jaxppo.models import shapes
from jaxppo.parallel import sharding

SHAPE = shapes.llama(
    vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64
)
SETTINGS = RunConfig(batch_size=32, minibatches=2, lora=0, prompt_length=4, response_length=8)


def test_bytes_of_a_tree():
    shared = jnp.zeros((2, 3))
    assert (
        memory.tree_bytes({"a": shared, "b": shared, "c": jnp.zeros(4, jnp.int32)})
        == 2 * 3 * 4 + 16
    )
    assert memory.tree_bytes(jax.random.key(0)) == 8  # two words


def test_minimum_bytes_of_a_step():
    """State, gradient, caches (32 rows, 2 layers, keys and values, 2 heads of 4, 4 + 8 tokens, 4
    bytes; and two masks and slots), logits.
    """
    model = models.make(SHAPE)
    params = model.init(jax.random.key(0))
    state = ppo.init_state(
        SETTINGS, params, {"base": {}, "reference": None, "reward": {}}, jax.random.key(0)
    )
    parameters = memory.tree_bytes(params)
    cache = 32 * 2 * 2 * 2 * 4 * 12 * 4 + 32 * 12 + 2 * 4
    assert (
        memory.minimum_bytes(SETTINGS, model, state, shares=1)
        == memory.tree_bytes(state) + parameters + cache + 32 * 64 * 4
    )
    assert memory.tree_bytes(state) > 3 * parameters  # with two moments
    alone = memory.minimum_bytes(SETTINGS, model, state, shares=1) - memory.minimum_bytes(
        SETTINGS, model, state, shares=8
    )
    assert alone == (cache - 2 * 4) * 7 / 8 + 28 * 64 * 4


def test_over_a_mesh_a_device_needs_its_share():
    """Of 64 x 16 an eighth of the embedding; heads, and so the cache, are not cut by fsdp."""
    model, mesh = models.make(SHAPE), sharding.make_mesh("fsdp=8")
    init = lambda params: ppo.init_state(
        SETTINGS, params, {"base": {}, "reference": None, "reward": {}}, jax.random.key(0)
    )
    params = model.init(jax.random.key(0))
    placed = sharding.place(params, mesh)
    assert memory.tree_bytes(placed["embed"]) == memory.tree_bytes(params["embed"]) / 8
    state = init(placed)
    for moments in (state.opt_state, init(params).opt_state):
        assert memory.tree_bytes(moments) > memory.tree_bytes(placed)
    assert memory.tree_bytes(state.opt_state) < memory.tree_bytes(init(params).opt_state) / 4
    saved = memory.minimum_bytes(SETTINGS, model, init(params), shares=8) - memory.minimum_bytes(
        SETTINGS, model, state, shares=8
    )
    gradient = memory.tree_bytes(params) - memory.tree_bytes(placed)
    assert saved == memory.tree_bytes(init(params)) - memory.tree_bytes(state) + gradient


def test_under_pmap_the_first_device_also_keeps_the_first_state():
    model = models.make(SHAPE)
    frozen = {"base": {}, "reference": model.init(jax.random.key(1)), "reward": {}}
    state = ppo.init_state(SETTINGS, model.init(jax.random.key(0)), frozen, jax.random.key(0))
    alone, first = (
        memory.minimum_bytes(SETTINGS, model, state, shares=8, replicated=x) for x in (False, True)
    )
    assert (
        first - alone == memory.tree_bytes(state) > 4 * memory.tree_bytes(state.params)
    )  # with two moments and the reference


def test_a_step_that_cannot_fit_is_refused_with_the_numbers(monkeypatch):
    model = models.make(SHAPE)
    frozen = {"base": {}, "reference": None, "reward": {}}
    state = ppo.init_state(SETTINGS, model.init(jax.random.key(0)), frozen, jax.random.key(0))
    memory.check_fits(SETTINGS, model, state, shares=1)
    huge = replace(SETTINGS, batch_size=2**27)
    with pytest.raises(
        UserError, match=r"needs at least \d+\.\d GiB on each device, which has .*--remat block"
    ):
        memory.check_fits(huge, model, state, shares=1)
    monkeypatch.setattr(memory, "device_memory", lambda: 1000)
    with pytest.raises(UserError, match="0.0 GiB"):
        memory.check_fits(SETTINGS, model, state, shares=1)


def test_memory_of_a_device(monkeypatch):
    assert 2**20 < memory.device_memory() < 2**50
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (12345, 12345))
    assert memory.device_memory() == 12345  # ulimit -v
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 77})
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [gpu])
    assert memory.device_memory() == 77


def test_suggestions_in_order():
    found = memory.suggestions(SETTINGS, devices=4, most=9)
    assert [text.split(" ")[0] for text in found] == [
        "--remat",
        "--tokens-per-microbatch",
        "--lora",
        "--mesh",
        "--dtype",
        "--batch-size",
    ]
    done = replace(
        SETTINGS, remat="block", tokens_per_microbatch=1, lora=8, dtype="bfloat16", mesh="fsdp=4"
    )
    assert memory.suggestions(done, devices=4) == ["--batch-size 16"]
    assert len(memory.suggestions(SETTINGS)) == 3
    dense = memory.suggestions(replace(SETTINGS, layout="dense"), devices=4)
    assert dense[1].startswith("--microbatches 2 ")


@pytest.mark.parametrize("adapters", [2, 0])
def test_frozen_weights_in_8_bits_take_a_byte(adapters):
    """A layer has 2 · 256 + 2 · 128 + 3 · 768 = 3072 weights of linear layers, with 3 bytes less
    each, and 2 · 16 + 2 · 8 + 2 · 48 + 16 = 160 scales of 4 bytes.
    """
    need = {}
    for base_dtype in ("same", "int8"):
        config = replace(SETTINGS, lora=adapters, base_dtype=base_dtype)
        model, state = compiled.abstract_state(config, SHAPE)
        need[base_dtype] = memory.minimum_bytes(config, model, state, shares=1)
    assert need["same"] - need["int8"] == 2 * (3 * 3072 - 4 * 160)


def test_groups_share_the_cache_of_their_prompt():
    """Of 32 rows in groups of 8, 4 prompts of 4 tokens: 28 fewer, each of 128 bytes a token (2
    layers, keys and values, 2 heads of 4, 4 bytes) and one of the mask.
    """
    model = models.make(SHAPE)
    params = model.init(jax.random.key(0))
    frozen = {"base": {}, "reference": None, "reward": {}}
    state = ppo.init_state(SETTINGS, params, frozen, jax.random.key(0))
    need = lambda group: memory.minimum_bytes(
        replace(SETTINGS, group_size=group), model, state, shares=1
    )
    assert need(1) - need(8) == 28 * 4 * (128 + 1)
