import pytest
from runs import SMALL

from jaxppo import train
from jaxppo.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run made from Python."""
    root = tmp_path_factory.mktemp("opened")
    reward = lambda prompt, response: -float(len(response))
    return train.policy(["1 + 1 =", "2 + 2 ="] * 2, reward, runs=str(root), **SMALL)


@pytest.mark.ci
def test_samples_of_a_run(run):
    texts = run.sample(["1 + 1 =", "2 + 2 ="], samples=2)
    assert len(texts) == 4 and texts[0] != texts[1]
    assert run.sample("1 + 1 =", greedy=True) == run.sample("1 + 1 =", greedy=True, seed=5)
    assert train.open_run(run.folder).sample(["1 + 1 =", "2 + 2 ="], samples=2) == texts
    with pytest.raises(UserError, match="^checkpoint=9: there is no such step"):
        run.sample("1 + 1 =", checkpoint=9)


@pytest.mark.ci
def test_an_export_of_a_run(run, tmp_path):
    place = run.export(tmp_path / "exported", checkpoint="newest")
    assert (place / "model.safetensors").exists() and (place / "README.md").exists()
