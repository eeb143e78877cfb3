import json
import shutil

import pytest
import toys
from runs import SMALL, rows_without_times

from jaxppo import pretrained, train
from jaxppo.errors import UserError

PROMPTS = ["1 + 1 =", "2 + 2 ="] * 2
# settings that runs did not have before adapters could be on any layer
LATER = {
    "correction_low", "correction_high", "correction_normalise", "rejection", "rejection_low",
    "rejection_high", "off_policy_threshold", "top_entropy", "likelihood_coef",
    "likelihood_threshold", "turn_gamma", "reference_every", "reference_decay", "distil",
    "distil_coef", "distil_beta", "ema_decay", "lora_on", "rslora", "base_dtype", "decode_dtype",
    "teacher", "eval_samples", "eval_right",
}  # fmt: skip


def short(prompt, response):
    return -float(len(response))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run made from Python."""
    root = tmp_path_factory.mktemp("opened")
    return train.policy(PROMPTS, short, runs=str(root), save_every=1, **SMALL)


@pytest.mark.ci
def test_samples_of_a_run(run):
    texts = run.sample(["1 + 1 =", "2 + 2 ="], samples=2)
    assert len(texts) == 4 and texts[0] != texts[1]
    assert run.sample("1 + 1 =", greedy=True) == run.sample("1 + 1 =", greedy=True, seed=5)
    assert train.open_run(run.folder).sample(["1 + 1 =", "2 + 2 ="], samples=2) == texts
    with pytest.raises(UserError, match="^checkpoint=9: there is no such step"):
        run.sample("1 + 1 =", checkpoint=9)


@pytest.mark.ci
def test_texts_are_put_into_the_runs_format(run, tmp_path):
    """As in the training of a task."""
    shutil.copytree(run.folder, tmp_path / "b")
    config = tmp_path / "b" / "config.json"
    stored = json.loads(config.read_text())
    config.write_text(json.dumps(stored | {"prompt_format": "{prompt} + {more} ="}))
    rows = [{"prompt": "1", "more": "1"}, {"prompt": "2", "more": "2"}]
    formatted = train.open_run(tmp_path / "b").sample(rows, samples=2)
    assert formatted == run.sample(["1 + 1 =", "2 + 2 ="], samples=2)


@pytest.mark.ci
def test_an_export_of_a_run(run, tmp_path):
    place = run.export(tmp_path / "exported", checkpoint="newest")
    assert (place / "model.safetensors").exists() and (place / "README.md").exists()


@pytest.mark.ci
def test_a_run_from_before_some_settings(run, tmp_path):
    """Stopped after step 1 and resumed, it is the same run, and so is its export."""
    old = tmp_path / run.folder.name
    shutil.copytree(run.folder, old)
    settings = json.loads((old / "config.json").read_text())
    assert settings.keys() > LATER and settings["lora"] > 0
    kept = {name: x for name, x in settings.items() if name not in LATER}
    shutil.rmtree(old / "checkpoints" / "2")
    (old / "config.json").write_text(json.dumps(kept))
    more = {"runs": str(tmp_path), "name": old.name, "resume": True, "save_every": 1}
    resumed = train.policy(PROMPTS, short, **SMALL, **more)
    assert rows_without_times(old) == rows_without_times(run.folder)
    (old / "config.json").write_text(json.dumps(kept))
    one, other = (
        pretrained.load(x.export(tmp_path / name, checkpoint="newest")).params
        for name, x in (("new", run), ("old", resumed))
    )
    toys.assert_same(one, other)
