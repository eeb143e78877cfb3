import dataclasses

import jax
import pytest

from jaxppo.config import RunConfig
from jaxppo.costs import chips, phases, program
from jaxppo.costs.hlo import Loop
from jaxppo.costs.program import Collective
from jaxppo.models import shapes
from jaxppo.parallel import sharding

TINY = shapes.llama(
    vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64
)
SETTINGS = RunConfig(
    batch_size=32, minibatches=2, lora=0, prompt_length=4, response_length=8, dtype="float32"
)


def test_weights_in_products():
    """Width 16, heads 4 x 4, kv 2 x 4: q and o 16 x 16, k and v 16 x 8, three of 16 x 48; two
    layers; the head 16 x 64.
    """
    assert phases.matrix_parameters(TINY) == (2 * (2 * 256 + 2 * 128 + 3 * 768), 1024)


def test_phases_by_hand():
    """One device, one row: 2 · 6144 weights · 12 tokens + 2 · 1024 · 8 + attention 4 · 2 · 16 · 12²
    / 2.
    """
    one = dataclasses.replace(SETTINGS, batch_size=1, minibatches=1)
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    found = phases.phase_costs(one, TINY, mesh)
    forward = 2 * 6144 * 12 + 2 * 1024 * 8 + 4 * 2 * 16 * 12 * 12 / 2
    assert found["generate"][0] == found["reference"][0] == forward
    assert found["update"][0] == 3 * forward
    # 8 tokens read 7168 weights of 4 bytes, and 2 · 2 layers · 2 heads · 4 · 4 bytes of each of 4 +
    # 8 / 2 cached tokens
    assert found["generate"][1] == 8 * 7168 * 4 + 8 * 2 * 2 * 2 * 4 * 4 * 8
    assert found["update"][1] == 3 * 7168 * 4 + 7168 * 28  # and Adam's seven passes
    adapters = phases.phase_costs(dataclasses.replace(one, lora=8), TINY, mesh)
    assert adapters["update"] == (2 * forward, 2 * 7168 * 4)


def test_eight_devices_share_the_work():
    alone = phases.phase_costs(SETTINGS, TINY, sharding.make_mesh("data=1", jax.devices()[:1]))
    shared = phases.phase_costs(SETTINGS, TINY, sharding.make_mesh("data=8"))
    for name in alone:
        assert shared[name][0] == alone[name][0] / 8
    assert shared["reference"][1] == alone["reference"][1]  # each reads all weights


def test_seconds_by_hand():
    """v5e: 197e12 operations, 819e9 bytes of memory and 200e9 bytes over links a second."""
    layers = Loop("layers", 10, True)
    gradients = Collective(
        "all-reduce", (("f32", (10**9,)),), 2, (layers,), "update"
    )  # 4e9 bytes, 2 · 1/2 of them sent, 10 times
    between = Collective("all-reduce", (("f32", (10**9,)),), 2, (), "")  # belongs to no phase
    counted = {"reference": (197e12, 819e7), "update": (0.0, 819e9)}
    found = program.time_bounds(chips.CHIPS["v5e"], counted, {gradients: 3, between: 5})
    assert found["reference"] == pytest.approx({"compute": 1.0, "memory": 0.01, "links": 0.0})
    assert found["update"] == pytest.approx(
        {"compute": 0.0, "memory": 1.0, "links": 0.6}
    )  # 3 · 10 · 4e9 / 200e9
