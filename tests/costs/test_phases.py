import dataclasses

import jax
import numpy as np
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
    """One device, one row: 2 · 6144 weights · 12 tokens + 2 · 1024 · 8 + attention, 4 · 2 · 16 for
    each of 12² / 2 pairs.
    """
    one = dataclasses.replace(SETTINGS, batch_size=1, minibatches=1)
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    found = phases.phase_costs(one, TINY, mesh)
    forward = 2 * 6144 * 12 + 2 * 1024 * 8 + 4 * 2 * 16 * 12 * 12 / 2
    assert found["generate"][0] == found["reference"][0] == forward
    assert found["update"][0] == 3 * forward
    # 8 tokens read 7168 weights of 4 bytes, and 2 · 2 layers · 2 heads · 4 · 4 bytes of each of the
    # 4 + 8 slots of the cache
    assert found["generate"][1] == 8 * 7168 * 4 + 8 * 2 * 2 * 2 * 4 * 4 * 12
    assert found["update"][1] == 3 * 7168 * 4 + 7168 * 28  # and Adam's seven passes
    adapters = phases.phase_costs(dataclasses.replace(one, lora=8), TINY, mesh)
    assert adapters["update"] == (2 * forward, 2 * 7168 * 4)


def test_frozen_weights_in_8_bits_are_a_byte_each():
    """6144 weights of blocks; the 1024 of the head have 4 bytes. Without adapters only the
    reference's.
    """
    assert phases.policy_bytes(SETTINGS, TINY) == 4 * 7168
    small = dataclasses.replace(SETTINGS, base_dtype="int8")
    assert phases.policy_bytes(small, TINY) == 4 * 7168
    assert phases.policy_bytes(small, TINY, frozen=True) == 6144 + 4 * 1024
    adapted = dataclasses.replace(small, lora=8)
    assert phases.policy_bytes(adapted, TINY) == 6144 + 4 * 1024
    both = dataclasses.replace(adapted, critic="separate")
    assert phases.policy_bytes(both, TINY) == 2 * 6144 + 4 * 1024
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    one = dataclasses.replace(adapted, batch_size=1, minibatches=1)
    assert phases.phase_costs(one, TINY, mesh)["reference"][1] == 6144 + 4 * 1024


def test_a_policy_sampled_in_8_bits_is_a_byte_a_weight():
    """While it decodes; a separate critic reads the tokens afterwards, with its cache."""
    small = dataclasses.replace(
        SETTINGS, batch_size=1, minibatches=1, decode_dtype="int8", old_logprobs="scorer"
    )
    assert phases.policy_bytes(small, TINY, sampling=True) == 6144 + 4 * 1024
    assert phases.policy_bytes(small, TINY) == 4 * 7168
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    plain = dataclasses.replace(small, decode_dtype="same")
    found, usual = (phases.phase_costs(x, TINY, mesh) for x in (small, plain))
    # 8 tokens
    assert usual["generate"][1] - found["generate"][1] == 8 * 3 * 6144
    assert found["update"] == usual["update"] and found["generate"][0] == usual["generate"][0]
    separate = dataclasses.replace(small, critic="separate")
    assert phases.phase_costs(separate, TINY, mesh)["generate"] == found["generate"]


GROUPS = dataclasses.replace(
    SETTINGS, batch_size=16, group_size=8, prompt_length=100, response_length=64
)


def test_what_a_decode_loop_does():
    """Two prompts of 100 tokens with 8 responses each; at most 64 tokens, of which the cache reads
    32 or all. All responses have 10 tokens but one of 40: 10 tokens for 16 rows, then 30 for the 8
    that are the fewest.
    """
    lengths = np.full(16, 10)
    lengths[3] = 40
    done = phases.decoding(GROUPS, lengths, packs=True)
    assert done.tokens == 40
    assert done.rows == 10 * 16 + 30 * 8
    assert done.prompt_slots == 40 * 2 * 100  # blocks of 8, then of 4 rows
    assert done.response_slots == 32 * (10 * 16 + 22 * 8) + 64 * 8 * 8
    dense = phases.decoding(GROUPS, lengths, packs=False)
    assert dense.rows == 40 * 16
    assert (dense.prompt_slots, dense.response_slots) == (40 * 16 * 100, 40 * 16 * 64)


def test_positions_of_an_update():
    """Two minibatches of one group of 8, whose 80 response tokens need two packed rows of at most
    64: with parts of 4 packed rows four each, with parts of 2 (five parts of the 8 · 164 slots have
    256 or more) or of one two.
    """
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    four = dataclasses.replace(GROUPS, tokens_per_microbatch=4 * 164)
    assert phases.packed_rows(four, np.full(16, 10), minibatches=2) == 8
    assert phases.packed_rows(GROUPS, np.full(16, 10), minibatches=2) == 4
    single = dataclasses.replace(GROUPS, tokens_per_microbatch=164)
    assert phases.packed_rows(single, np.full(16, 10), minibatches=2) == 4
    full, tokens = phases.update_positions(single, TINY, mesh)
    assert (full, tokens) == (16 * 164, 2 * 100 + 16 * 64)
    dense = dataclasses.replace(GROUPS, layout="dense")
    assert phases.update_positions(dense, TINY, mesh) == (16 * 164, 16 * 164)


def test_labels_of_a_group_share_a_packed_row():
    """Groups of eight labels of one token behind 48 of the prompt: a packed row a group. Alone, a
    row each, whose prompt fills it.
    """
    labels = dataclasses.replace(
        GROUPS, prompt_length=48, response_length=1, tokens_per_microbatch=1
    )
    assert phases.packed_rows(labels, np.ones(16, int)) == 2
    alone = dataclasses.replace(labels, group_size=1, advantage="gae")
    assert phases.packed_rows(alone, np.ones(16, int)) == 16


def test_lengths_have_their_mean():
    lengths = phases.response_lengths(64, 1024, 340)
    assert (
        lengths.mean() == pytest.approx(340, abs=1) and 1 <= lengths.min() < lengths.max() <= 1024
    )
    assert phases.response_lengths(3, 7).tolist() == [7, 7, 7]
    assert phases.response_lengths(3, 7, 9).tolist() == [7, 7, 7]


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
