"""Episodes of several turns on one device, under pmap, over a mesh and in every preset: the same
episodes, metrics and parameters.
"""

from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import test_modes
import test_presets
import worlds

from jaxppo.presets import ALGORITHMS, preset
from jaxppo.rewards import in_program

pytestmark = pytest.mark.ci

SHAPE = replace(test_modes.SHAPE, num_layers=1, max_length=4 + worlds.LENGTH)
# two packed rows a part
LONG = replace(
    test_modes.SGD, response_length=worlds.LENGTH, tokens_per_microbatch=38, log_samples=2
)
SETTINGS = {
    "grpo": replace(preset(LONG, "grpo"), batch_size=64, group_size=4, minibatches=2),
    "turn_gae": replace(LONG, advantage="turn_gae", turn_gamma=0.9),
}


def score_of_every_token(params, rollout):
    """The episode's score, and a sum of all tokens that were written or read: another token in one
    of 64 rows changes the mean by 1/128/64 = 1.2e-4 or more, six times what is tolerated.
    """
    read = rollout.attend[:, -worlds.LENGTH :]
    places = jnp.arange(1, worlds.LENGTH + 1)[None]
    seen = ((rollout.response + 1) * places % 101 * read).sum(1) / 128
    score, valid = in_program.episode_score(params, rollout)
    return score + seen, valid


def batches(settings):
    """Groups whose episodes are shorter from device to device: three turns on the first of 8, and
    one on the last.
    """

    def batch(number: int):
        given = test_modes.uneven(number, settings)
        row = np.arange(settings.batch_size, dtype=np.int32)
        return given.replace(extra={"turns": 3 - 3 * row // settings.batch_size})

    return batch


def options(settings) -> dict:
    """Of `test_modes.run`."""
    return {
        "shape": SHAPE,
        "environment": worlds.counting(tokens=worlds.by_chance),
        "reward": score_of_every_token,
        "batches": batches(settings),
        "steps": 2,
    }


@cache
def on_one_device(name: str):
    return test_modes.run(SETTINGS[name], **options(SETTINGS[name]))


@pytest.mark.parametrize(
    ("name", "mode", "mesh"),
    [
        ("grpo", "pmap", ""),
        ("grpo", "mesh", "data=2,fsdp=2,tensor=2"),
        pytest.param("turn_gae", "pmap", "", marks=pytest.mark.slow),
        pytest.param("turn_gae", "mesh", "data=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
        pytest.param("grpo", "mesh", "fsdp=8", marks=pytest.mark.slow),
    ],
)
def test_devices_play_the_same_episodes(name, mode, mesh):
    """Packed; some devices are done after a turn, others go on. The answers are drawn at random;
    the metrics have all tokens of two episodes, those of the answers as −2 and less.
    """
    want = on_one_device(name)
    for row in want[1]:
        assert (row["samples"] <= -2).sum() > 2
        assert row["skipped"] == 0 and row["first_ratio_off"] < 1e-4 and row["finished"] == 1
    got = test_modes.run(SETTINGS[name], mode, mesh, **options(SETTINGS[name]))
    test_modes.assert_equal_runs(got, want)


IN_CI = ("vapo", "remax")
PACKED = ("remax",)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in IN_CI else pytest.mark.slow) for x in ALGORITHMS]
)
def test_every_preset_learns_from_episodes(name):
    """Two steps whose numbers are finite."""
    layout = "packed" if name in PACKED else "dense"
    sizes = {"response_length": worlds.LENGTH, "batch_size": 32, "layout": layout}
    settings = test_presets.small(name, lr=1e-4, **sizes)
    learner = test_presets.Learner(settings, environment=worlds.counting())
    for row in learner.run(2):
        assert all(np.isfinite(x) for x in row.values()), row
        assert row["skipped"] == 0 and row["invalid_rows"] == 0 and row["first_ratio_off"] < 1e-4
        # up to three turns of up to three tokens, and no answer
        assert 1 < row["length"] < 9
