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
