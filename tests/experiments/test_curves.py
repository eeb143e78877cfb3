import numpy as np
import pytest
from matplotlib.figure import Figure
from runs import load_script

curves = load_script("curves")


def test_the_mean_of_steps_in_a_row():
    np.testing.assert_allclose(curves.smooth([1, 2, 3, 4, 9], 3), [2, 3, 16 / 3])


def test_a_curve_shorter_than_the_window_is_averaged_whole():
    (axis,) = np.atleast_1d(Figure().subplots())
    curves.draw(axis, [[1.0, 3.0]], "C0", "")
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [[2, 2]])


def record(seed: int) -> dict:
    """Six steps with the reward and KL of a seed, and two validations."""
    own = {"reward": [float(seed)] * 6, "kl": [0.0] * 6, "validation": [[3, 0.1], [6, 0.2 + seed]]}
    config = {"model": "", "advantage": "rloo", "seed": seed}
    return {"task": "spelling", "config": config, "supervised": {}, "curve": own}


def test_a_task_has_its_mean_its_range_and_a_line_for_each_seed():
    axes = Figure().subplots(2)
    curves.panel(axes, [record(1), record(3)])
    mean, *validations = axes[0].lines
    np.testing.assert_allclose(mean.get_xydata(), [[5, 2], [6, 2]])  # (1 + 3) / 2
    assert [line.get_ydata()[-1] for line in validations] == pytest.approx([1.2, 3.2])
    (band,) = axes[0].collections
    assert band.get_datalim(axes[0].transData).intervaly == pytest.approx([1, 3])
    assert len(axes[1].lines) == 1
