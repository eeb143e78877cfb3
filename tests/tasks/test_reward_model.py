import dataclasses

import numpy as np
import pytest

from jaxppo.run.sampler import Sample
from jaxppo.tasks import TaskConfig, reward_model, stages

pytestmark = pytest.mark.ci


def test_it_prefers_what_it_was_trained_to_prefer(tmp_path):
    options = TaskConfig(task="spelling", sft_lr=3e-3, parallel="jit", runs=str(tmp_path))
    options = dataclasses.replace(stages.tiny_options(options), tiny=True)
    pairs = [(f"copy {i}\n=", "yes", "no") for i in range(80)]
    model = reward_model.train_reward_model(options, pairs, name="reward", seed=0, steps=20)
    assert model.accuracy == 1.0
    samples = [Sample("copy 7\n=", response, [], 0.0, True) for response in ("yes", "no")]
    good, bad = model.scores(samples)
    assert good > bad and np.isfinite([good, bad]).all()


@pytest.mark.parametrize(("devices", "rows"), [(16, 32), (32, 64)])
def test_the_batch_follows_the_devices(tmp_path, monkeypatch, devices, rows):
    """A pair is two rows, on one device."""
    seen = []

    class Seen(Exception):
        pass

    def load_policy(config):
        seen.append(config.batch_size)
        raise Seen

    monkeypatch.setattr(reward_model.load, "load_policy", load_policy)
    monkeypatch.setattr(reward_model.parallel, "row_shards", lambda mode, mesh: devices)
    options = TaskConfig(task="spelling", tiny=True, runs=str(tmp_path))
    with pytest.raises(Seen):
        reward_model.train_reward_model(options, [], name="reward", seed=0, steps=2)
    assert seen == [rows]
