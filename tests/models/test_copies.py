from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import models, parallel, ppo
from jaxppo.models import copies, lora
from jaxppo.run.checkpoint import Checkpoints

EVERY = replace(toys.SETTINGS, reference_every=2, lr=0.05)


def test_a_copy_that_nothing_asks_for_is_in_no_checkpoint(llama):
    assert not {"lagged", "reference", "average"} & toys.state(llama).statistics.keys()
    settings = replace(EVERY, mask_top_p=0.5, ema_decay=0.9)
    found = toys.state(llama, settings).statistics
    for name in ("lagged", "reference", "average"):
        toys.assert_same(found[name], llama.params)


def test_reset_and_average_by_hand():
    """Step 3 of a reset every 2 steps and a decay of .75: .75 x 4 + .25 x 8 = 5; step 4: 8. The
    average of decay .5 is (4 + 8) / 2 = 6 at every step.
    """
    config = replace(EVERY, reference_decay=0.75, ema_decay=0.5)
    state = toys.state(toys.llama(), config)
    state = state.replace(params={"w": jnp.float32(8.0)}, step=jnp.int32(3))
    statistics = {"reference": {"w": jnp.float32(4.0)}, "average": {"w": jnp.float32(4.0)}}
    statistics |= {"gain": 1}

    def moved(step, names=copies.BEFORE, settings=config):
        return copies.follow(state.replace(step=jnp.int32(step)), statistics, settings, names)

    found = moved(3)
    assert float(found["reference"]["w"]) == 5.0 and found["gain"] == 1
    assert float(found["average"]["w"]) == 4.0
    assert float(moved(4)["reference"]["w"]) == 8.0
    found = moved(4, copies.AFTER)
    assert float(found["reference"]["w"]) == 4.0 and float(found["average"]["w"]) == 6.0
    without = replace(config, reference_every=0)
    assert float(moved(4, settings=without)["reference"]["w"]) == 5.0
    kept = replace(config, reference_decay=0.0)
    assert float(moved(3, settings=kept)["reference"]["w"]) == 4.0


def test_the_average_of_16_bit_weights_is_in_float32():
    """.996 x 1 + .004 x 2 = 1.004, where bfloat16 has steps of .0078."""
    config = replace(toys.SETTINGS, ema_decay=0.996)
    one, two = ({"w": jnp.full((2,), x, jnp.bfloat16)} for x in (1, 2))
    state = toys.state(toys.llama(), config).replace(params=two)
    found = copies.follow(state, copies.init_copies(one, config), config, copies.AFTER)["average"]
    assert found["w"].dtype == jnp.float32
    np.testing.assert_allclose(found["w"], 1.004, rtol=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize("adapters", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_the_average_is_of_all_steps_and_of_what_is_trained(llama, adapters):
    """a₂ = d² θ₀ + (1 − d)(d θ₁ + θ₂) with d = .75, the weights after each step."""
    settings = replace(toys.SETTINGS, ema_decay=0.75, lora=adapters, lr=0.05)
    model = models.make(toys.LLAMA, lora=adapters)
    params, base, reference = toys.random_params(model), {}, llama.params
    if adapters:
        (params, base), reference = lora.split(params, lora.is_trained), None
    own = llama._replace(model=model, params=params)
    state = toys.state(own, settings)
    state = state.replace(frozen={**state.frozen, "base": base, "reference": reference})
    step, seen = toys.step(own, settings), [toys.numbers(state.params)]
    for _ in range(2):
        state, _ = step(state, toys.prompts())
        seen.append(toys.numbers(state.params))
    want = jax.tree.map(lambda a, b, c: 0.5625 * a + 0.25 * (0.75 * b + c), *seen)
    toys.assert_close(state.statistics["average"], want, atol=1e-6)
    toys.assert_same(copies.averaged(state).params, state.statistics["average"])
    toys.assert_same(copies.averaged(state).opt_state, state.opt_state)
    plain = toys.state(own)
    assert copies.averaged(plain).params is plain.params


@pytest.mark.ci
@pytest.mark.parametrize("adapters", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_the_kl_is_that_to_the_reference_of_the_step(llama, adapters):
    """Reset every two steps: the KL is 0 in steps 0 and 2, and is not in steps 1 and 3."""
    settings = replace(EVERY, lora=adapters)
    model = models.make(toys.LLAMA, lora=adapters)
    params, base = toys.random_params(model), {}
    reference = toys.copied(params)
    if adapters:
        params, base = lora.split(params, lora.is_trained)
        params = jax.tree.map(lambda x: x.at[...].set(0.02), params)
        reference = None
    own = llama._replace(model=model, params=params)
    state = toys.state(own, settings)
    state = state.replace(frozen={**state.frozen, "base": base, "reference": reference})
    step, start, kls = toys.step(own, settings), toys.copied(state.params), []
    for _ in range(4):
        state, metrics = step(state, toys.prompts())
        kls.append(abs(float(metrics["kl"])))
    assert kls[0] < 1e-5 and kls[2] < 1e-5 and kls[1] > 1e-3 and kls[3] > 1e-3
    assert step.traces == 1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.statistics["reference"], start)
    assert max(jax.tree.leaves(moved)) > 1e-3
    if not adapters:  # the frozen copy is that of the start
        toys.assert_same(state.frozen["reference"], start)


BOTH = replace(EVERY, reference_decay=0.5, kl_coef=0.1, ema_decay=0.5)


@pytest.fixture(scope="module")
def step():
    """One compiled step, whose reference and average both move."""
    return toys.step(toys.llama(), BOTH)


@pytest.mark.ci
def test_stopped_and_resumed_it_is_the_same(llama, step, tmp_path):
    """Stopped after step 3. Half of the reference of step 4 is that of step 3, the policy after
    step 2, which is nowhere but in the checkpoint.
    """
    state = toys.state(llama, BOTH)
    for number in range(4):
        if number == 3:
            checkpoints = Checkpoints(tmp_path)
            checkpoints.save(state, score=None)
            checkpoints.close()
        state, metrics = step(state, toys.prompts())
    again = Checkpoints(tmp_path).restore(toys.state(llama, BOTH, seed=1))
    assert int(again.step) == 3
    again, found = step(again, toys.prompts())
    toys.assert_same(again, state)
    toys.assert_same(found, metrics)


@pytest.mark.ci
def test_under_pmap_and_over_a_mesh_the_same(llama, step):
    settings, state = BOTH, toys.state(llama, BOTH)
    for _ in range(2):
        state, metrics = step(state, toys.prompts())
    for options in (
        {"mode": "pmap", "devices": jax.devices()[:2]},
        {"mesh": "data=2,fsdp=2,tensor=2"},
    ):
        step = parallel.compile_for_mode(
            lambda axis: ppo.make_train_step(
                llama.model, toys.parts(settings), settings, axis_name=axis
            ),
            **options,
        )
        other, prompts = step.place(toys.state(llama, settings)), jax.device_get(toys.prompts())
        for _ in range(2):
            other, found = step(other, step.put(prompts))
        for name in ("reference", "average"):
            got, want = step.unreplicate(other).statistics[name], state.statistics[name]
            toys.assert_close(got, want, atol=2e-4)
        assert float(found["kl"]) == pytest.approx(float(metrics["kl"]), abs=1e-3)
    for name in ("reference", "average"):
        kernel = other.statistics[name]["layers_0"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4  # fsdp x tensor
