from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo import models, parallel, ppo
from jaxppo.models import lora
from jaxppo.models import reference as moving

EVERY = replace(toys.SETTINGS, reference_every=2, lr=0.05)


def test_a_reference_that_stays_is_in_no_checkpoint(llama):
    assert "reference" not in toys.state(llama).statistics


def test_reset_and_average_by_hand():
    """Step 3 of a reset every 2 steps and a decay of .75: .75 x 4 + .25 x 8 = 5; step 4: 8."""
    config = replace(EVERY, reference_decay=0.75)
    state = toys.state(toys.llama(), config)
    state = state.replace(params={"w": jnp.float32(8.0)}, step=jnp.int32(3))
    statistics = {"reference": {"w": jnp.float32(4.0)}, "gain": 1}
    found = moving.update_moving(state, statistics, config)
    assert float(found["reference"]["w"]) == 5.0 and found["gain"] == 1
    found = moving.update_moving(state.replace(step=jnp.int32(4)), statistics, config)
    assert float(found["reference"]["w"]) == 8.0
    without = replace(config, reference_every=0)
    found = moving.update_moving(state.replace(step=jnp.int32(4)), statistics, without)
    assert float(found["reference"]["w"]) == 5.0
    kept = replace(config, reference_decay=0.0)
    assert float(moving.update_moving(state, statistics, kept)["reference"]["w"]) == 4.0


@pytest.mark.parametrize("adapters", [0, 2])
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


@pytest.mark.ci
def test_under_pmap_and_over_a_mesh_the_same(llama):
    settings = replace(EVERY, reference_decay=0.5, kl_coef=0.1)
    step, state = toys.step(llama, settings), toys.state(llama, settings)
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
        toys.assert_close(
            step.unreplicate(other).statistics["reference"],
            state.statistics["reference"],
            atol=2e-4,
        )
        assert float(found["kl"]) == pytest.approx(float(metrics["kl"]), abs=1e-3)
    kernel = other.statistics["reference"]["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4  # fsdp x tensor
