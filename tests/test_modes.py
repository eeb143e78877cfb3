"""The same step on one device, under pmap and over meshes of 8 simulated devices: the same tokens, metrics and parameters."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import toys

from jaxppo import algorithms, config, models, parallel, ppo
from jaxppo.config import UserError
from jaxppo.rewards import count_token, on_host

SHAPE = config.llama(vocab_size=16, width=16, num_layers=1, num_heads=4, num_kv_heads=4, max_length=16)
SETTINGS = replace(toys.SETTINGS, batch_size=32, minibatches=2, lr=1e-4, lr_schedule="constant", kl_adaptive=True, kl_target=1.0)
SGD = replace(SETTINGS, optimizer="sgd", lr=1e-2)
MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=4,tensor=2"]


def prompts(number: int):
    """Lengths differ: device 0 of 8 has the shortest rows only."""
    return jax.device_get(toys.ragged([1 + i // 8 for i in range(32)], 4, seed=number))


def run(settings, mode="jit", mesh="", steps=3, reward=None, remat="none"):
    model = models.make(SHAPE, remat=remat)
    parts = algorithms.make_parts(settings, reward or count_token(3))
    make = lambda axis_name: ppo.make_train_step(model, parts, settings, axis_name=axis_name)
    step = parallel.prepare(make, mode=mode, mesh=mesh)
    params = toys.random_params(model, seed=1)
    frozen = {"base": {}, "reference": toys.random_params(model, seed=2), "reward": {}}
    state = step.place(ppo.init_state(settings, params, frozen, jax.random.key(0)))
    rows = []
    for number in range(steps):
        state, metrics = step(state, step.put(prompts(number)))
        rows.append(jax.device_get(metrics))
    assert step.traces == 1
    return step.whole(state), rows


@pytest.fixture(scope="module")
def one_device():
    """The reference of each kind of settings, computed once."""
    known = {}

    def get(name, settings, **options):
        if name not in known:
            known[name] = run(settings, **options)
        return known[name]

    return get


def assert_equal_runs(got, want):
    for a, b in zip(got[1], want[1], strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=2e-5, rtol=2e-4, err_msg=name)
    toys.assert_close(got[0].params, want[0].params, atol=2e-5)
    toys.assert_close(got[0].controller, want[0].controller, rtol=1e-5)
    assert (int(got[0].step), int(got[0].cursor)) == (int(want[0].step), int(want[0].cursor))


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_pmap_equals_one_device(one_device, kind):
    """Gradients are summed once, not 8 times: SGD would show it."""
    settings = {"adam": SETTINGS, "sgd": SGD}[kind]
    assert_equal_runs(run(settings, "pmap"), one_device(kind, settings))


@pytest.mark.parametrize("mesh", MESHES)
def test_meshes_equal_one_device(one_device, mesh):
    assert_equal_runs(run(SGD, "mesh", mesh), one_device("sgd", SGD))


@pytest.mark.parametrize(
    ("mode", "mesh", "changes", "remat"),
    [
        ("pmap", "", {"microbatches": 2}, "block"),
        ("mesh", "data=4,fsdp=2", {"microbatches": 4, "minibatches": 1}, "none"),
        ("jit", "", {"microbatches": 4, "minibatches": 1}, "full"),
        ("pmap", "", {"advantage": "group", "group_size": 2, "value_loss": "none", "aggregate": "sequence_mean"}, "none"),
    ],
)
def test_a_covering_set(one_device, mode, mesh, changes, remat):
    plain = replace(SGD, **(changes | {"microbatches": 1}))
    want = one_device(str(sorted((changes | {"microbatches": 1}).items())), plain)
    assert_equal_runs(run(replace(SGD, **changes), mode, mesh, remat=remat), want)


def host_reward():
    decode = lambda rows: ["".join(chr(97 + token) for token in row) for row in rows]
    return on_host(lambda prompt, response: response.count("d") + 0.1 * len(response), decode)


@pytest.mark.parametrize(("mode", "mesh"), [("pmap", ""), ("mesh", "data=8")])
def test_a_reward_on_the_host(one_device, mode, mesh):
    reward = host_reward()
    want = one_device("host", SGD, reward=reward, steps=2)
    assert_equal_runs(run(SGD, mode, mesh, reward=reward, steps=2), want)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "mesh"])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("remat", ["none", "block", "full"])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_full_product(one_device, mode, microbatches, remat, name):
    settings = {"adam": SETTINGS, "sgd": SGD}[name]
    for mesh in MESHES if mode == "mesh" else [""]:
        got = run(replace(settings, microbatches=microbatches), mode, mesh, remat=remat)
        assert_equal_runs(got, one_device(name, settings))


def test_auto_is_pmap_on_several_devices():
    make = lambda axis_name: lambda state, prompts: (state, {})
    assert parallel.prepare(make).name == "pmap on 8 devices"
    assert parallel.prepare(make, devices=jax.devices()[:1]).name == "jit on one device"
    with pytest.raises(UserError, match="--parallel 'tpu': choose one of auto, jit, pmap, mesh"):
        parallel.prepare(make, mode="tpu")


def test_several_steps_in_one_dispatch_under_pmap():
    model, settings = models.make(SHAPE), SGD
    parts = algorithms.make_parts(settings, count_token(3))
    make = lambda axis_name: ppo.repeat(ppo.make_train_step(model, parts, settings, axis_name=axis_name))
    stacked = jax.tree.map(lambda *x: np.stack(x), prompts(0), prompts(1))
    results = []
    for mode, mesh in (("jit", ""), ("pmap", ""), ("mesh", "data=8")):
        step = parallel.prepare(make, mode=mode, mesh=mesh, leading=1)
        frozen = {"base": {}, "reference": toys.random_params(model, seed=2), "reward": {}}
        start = ppo.init_state(settings, toys.random_params(model, seed=1), frozen, jax.random.key(0))
        state, metrics = step(step.place(start), step.put(stacked))
        assert metrics["loss"].shape == (2,)
        results.append(step.whole(state).params)
    for other in results[1:]:
        toys.assert_close(other, results[0], atol=2e-5)
