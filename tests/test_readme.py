"""What README.md shows runs, word for word."""

import re
import runpy
from pathlib import Path

import toys

from jaxppo.rewards import count_token

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_parts_that_are_swapped_make_a_step(tmp_path):
    section = README.split("## Swap a part")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 6
    toy = toys.llama()
    names = {
        "config": toys.SETTINGS,
        "model": toy.model,
        "reward": count_token(3),
        "state": toys.state(toy),
        "prompts": toys.prompts(),
    }
    script = tmp_path / "swapped.py"
    script.write_text("\n".join(blocks))
    found = runpy.run_path(str(script), init_globals=names)
    metrics = {name: float(x) for name, x in found["metrics"].items()}
    assert int(found["state"].step) == 1 and metrics["skipped"] == 0 and metrics["grad_norm"] > 0
    assert -toys.SETTINGS.response_length < metrics["reward"] <= 0  # the reward of the last block but three, not the count
    assert metrics["mean_ratio"] > 0.5  # what the loss says of itself is among the metrics
