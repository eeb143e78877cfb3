import math
import xml.etree.ElementTree as ElementTree

from report_runs import seeds
from runs import a_run, lines

from jaxppo.commands.report import records
from jaxppo.run import figures


def test_a_line_is_the_mean_of_the_seeds_and_the_band_their_range(tmp_path):
    runs = [
        records.read(path) for path in seeds(tmp_path, "a", [0.0, 1.0, 2.0], [2.0, 3.0, math.nan])
    ]
    assert figures.line(runs, "reward") == (
        [1, 2, 3],
        [1.0, 2.0, 2.0],
        [0.0, 1.0, 2.0],
        [2.0, 3.0, 2.0],
    )
    # over two steps: seed 0 has 0, .5, 1.5; seed 1 has 2, 2.5, and 3 for the last, whose own is
    # none
    assert figures.line(runs, "reward", window=2) == (
        [1, 2, 3],
        [1.0, 1.5, 2.25],
        [0.0, 0.5, 1.5],
        [2.0, 2.5, 3.0],
    )
    assert figures.bad_steps(runs, "reward") == [3] and figures.bad_steps(runs, "kl") == []
    runs[0].rows[0]["skipped"] = 1.0
    assert figures.bad_steps(runs, "kl") == [1]


def test_long_lines_are_thinned(tmp_path):
    (run,) = (records.read(path) for path in seeds(tmp_path, "a", list(range(1000))))
    found = figures.line([run], "reward")
    assert len(found.steps) <= figures.MAX_POINTS + 1 and (found.steps[0], found.steps[-1]) == (
        1,
        1000,
    )
    assert found.mean == [step - 1 for step in found.steps]


def test_panels(tmp_path):
    """A metric that is always 0 has none; a validation metric shares that of training."""
    row = {
        "step": 1,
        "reward": 1.0,
        "kl": 0.1,
        "clip_fraction": 0.0,
        "entropy": math.nan,
        "validation_kl": 1.0,
    }
    row |= {"validation_wer": 0.5, "validation_score": -0.5, "other": 3.0}
    run = records.read(a_run(tmp_path / "a", metrics_jsonl=lines(row)))
    assert figures.panels([run]) == ["reward", "validation_wer", "kl", "entropy"]
    named = row | {"score_right": 0.5, "score_short": 0.0}
    run = records.read(a_run(tmp_path / "named", metrics_jsonl=lines(named)))
    assert figures.panels([run])[:3] == ["reward", "score_right", "validation_wer"]
    many = records.read(
        a_run(
            tmp_path / "b", metrics_jsonl=lines(row | {f"validation_{i}": 1.0 for i in range(99)})
        )
    )
    assert figures.panels([many]) == [
        "reward",
        "validation_wer",
        *(f"validation_{i}" for i in range(3)),
        "kl",
        "entropy",
    ]
    losses = records.read(
        a_run(tmp_path / "c", metrics_jsonl=lines({"step": 1, "loss": 1.0, "entropy": 2.0}))
    )
    assert figures.panels([losses]) == ["loss", "entropy"]


def relative_luminance(colour: str) -> float:
    """WCAG 2's (https://www.w3.org/TR/WCAG22/#dfn-relative-luminance), 0 to 1."""
    linear = [
        x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
        for x in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_groups_are_told_apart_without_colour():
    styles = [figures.line_style(number) for number in range(16)]
    assert len({str(style["linestyle"]) for style in styles[:8]}) == 8 == len(set(figures.MARKERS))
    assert len({str(style) for style in styles}) == 16
    # on white, the first four colours stand out as lines must: at least 3 : 1
    assert all(1.05 / (relative_luminance(colour) + 0.05) > 3 for colour in figures.COLOURS[:4])


def test_the_picture_is_the_same_for_the_same_runs(tmp_path):
    groups = records.groups(
        [records.read(path) for path in seeds(tmp_path, "a", [0.0, 1.0], [1.0, math.nan])]
    )
    one = figures.draw(groups)
    assert one == figures.draw(groups)
    root = ElementTree.fromstring(one)
    assert (
        root.tag == "{http://www.w3.org/2000/svg}svg"
        and float(root.get("width", "").removesuffix("pt")) == 7.2 * 72
    )
    assert "#0072b2" in one


def test_curves_of_a_run_are_a_png(curves, tmp_path):
    run = a_run(tmp_path / "a", metrics_jsonl=lines({"step": 1, "reward": 1.0, "kl": 0.1}))
    path = figures.plot_curves(run)
    assert path == run / "curves.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
