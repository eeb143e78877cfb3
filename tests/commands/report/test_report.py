"""The report: its numbers, its picture, and that a hostile run does no harm."""

import csv
import json
import math
import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import TEXTS, Read
from runs import a_run, lines

from jaxppo import cli, commands
from jaxppo.commands import report
from jaxppo.commands.report import figures, outcomes, pages, records, sections
from jaxppo.commands.report.outcomes import Outcome
from jaxppo.config import RunConfig
from jaxppo.errors import UserError
from jaxppo.run.settings import to_dict
from jaxppo.tasks import TaskConfig

OUTPUTS = [
    {"prompt": f"p{i}", "supervised": "no", "policy": "yes" if i < 3 else "no", "reference": "yes"}
    for i in range(4)
]
RESULT = {
    "supervised": {"score": 0.0, "exact": 0.0},
    "policy": {"score": 0.75, "exact": 0.75},
    "gain": {"exact": [0.75, 0.25, 1.0]},
    "test_rows": 4,
    "versions": {"jax": "9.9", "git": "0123456789abcdef"},
    "config": {"steps": 3, "task": "spelling", "lora": 0},
}


def rows(rewards, **others) -> str:
    return lines(
        *({"step": k, "reward": x, "kl": k / 4, **others} for k, x in enumerate(rewards, 1))
    )


def seeds(tmp_path, name: str, *curves, **changes) -> list[Path]:
    base = RunConfig(steps=len(curves[0]), **changes)
    make = lambda seed, curve: a_run(
        tmp_path / f"{name}-{seed}", replace(base, seed=seed), metrics_jsonl=rows(curve)
    )
    return [make(seed, curve) for seed, curve in enumerate(curves)]


def a_task(root: Path, *, seed: int = 0, outputs=OUTPUTS, result=RESULT, steps: int = 3) -> Path:
    root.mkdir()
    validation = {"validation_score": 0.5, "validation_exact": 0.5}
    config = TaskConfig(task="spelling", steps=steps, seed=seed, runs=str(root), name="policy")
    a_run(root / "policy", config, metrics_jsonl=rows([0.1, 0.2, 0.3], **validation))
    (root / "outputs.jsonl").write_text(lines(*outputs))
    (root / "result.json").write_text(json.dumps(result))
    return root


def in_csv(folder: Path) -> dict[tuple[str, str, str, str], tuple[float, ...]]:
    """{(group, run, number, on): (value, low, high)} of report.csv."""
    with (folder / "report.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    number = lambda x: float(x) if x else math.nan
    return {
        (x["group"], x["run"], x["number"], x["on"]): tuple(
            number(x[k]) for k in ("value", "low", "high")
        )
        for x in found
    }


# Numbers


def test_outcomes_of_a_run(tmp_path):
    """Twelve steps, of which the last ten count: 2 to 11, mean 6.5; the last validation."""
    text = rows(range(12)) + lines(
        {"step": 12, "reward": 11.0, "validation_score": 0.2, "validation_x": 0.1}
    )
    found = outcomes.of_run(records.read(a_run(tmp_path / "a", steps=12, metrics_jsonl=text)))
    assert found["reward", "training"] == Outcome(6.5)
    assert found["score", "validation, last"] == Outcome(0.2) and found[
        "x", "validation, last"
    ] == Outcome(0.1)
    assert set(found) == {
        ("reward", "training"),
        ("kl", "training"),
        ("score", "validation, last"),
        ("x", "validation, last"),
    }
    assert outcomes.csv_rows([], []) == []


def test_outcomes_of_a_task_have_intervals_over_the_test_examples(tmp_path):
    """Three of four right: a bootstrap of four draws reaches from 1/4 to 1."""
    found = outcomes.of_run(records.read(a_task(tmp_path / "w")))
    assert found["exact", outcomes.BEFORE] == Outcome(0.0, 0.0, 0.0, "4 test examples")
    assert found["exact", outcomes.AFTER] == Outcome(0.75, 0.25, 1.0, "4 test examples")
    assert found["exact", outcomes.GAIN] == Outcome(0.75, 0.25, 1.0, "4 test examples")
    assert ("score", outcomes.AFTER) not in found and (
        "score",
        "validation, last",
    ) not in found  # they are exact itself


@pytest.mark.parametrize("outputs", [OUTPUTS[:3], [OUTPUTS[0] | {"policy": 3}], []])
def test_no_interval_from_responses_that_do_not_give_the_result(tmp_path, outputs):
    outcome = outcomes.of_run(records.read(a_task(tmp_path / "w", outputs=outputs)))[
        "exact", outcomes.AFTER
    ]
    assert outcome.value == 0.75 and math.isnan(outcome.low)


def test_outcomes_of_a_script(tmp_path):
    """A standard error gives value ± 1.96 of it."""
    result = json.dumps({"gain": 0.5, "gain_se": 0.1, "seed": 3, "text": "x", "distinct": 0.9})
    found = outcomes.of_run(records.read(a_run(tmp_path / "a", result_json=result)))
    assert found["gain", "result.json"] == Outcome(
        0.5, pytest.approx(0.304), pytest.approx(0.696), "its standard error"
    )
    assert found["distinct", "result.json"].value == 0.9 and ("seed", "result.json") not in found


@pytest.mark.parametrize(
    "result",
    [{"policy": 3}, {"policy": {"exact": "x"}}, {"policy": {"exact": 1}, "gain": {"exact": [1]}}],
)
def test_strange_results_are_ignored(tmp_path, result):
    found = outcomes.of_run(records.read(a_task(tmp_path / "w", result=result)))
    assert (
        found["reward", "training"].value == pytest.approx(0.2)
        and ("exact", outcomes.GAIN) not in found
    )


def test_a_group_has_a_t_interval_over_its_seeds(tmp_path):
    """Ends 1, 2, 3: 2 ± 4.303 / √3. One that is not finite is not left out: then there is no
    mean.
    """
    runs = [records.read(path) for path in seeds(tmp_path, "a", [1.0], [2.0], [3.0])]
    (group,) = records.groups(runs)
    outcome = outcomes.of_group(group)["reward", "training"]
    assert (
        outcome[:3] == pytest.approx((2.0, -0.4841, 4.4841), abs=1e-3) and outcome.over == "3 seeds"
    )
    runs[2].rows[0]["reward"] = math.nan
    outcome = outcomes.of_group(group)["reward", "training"]
    assert (
        math.isnan(outcome.value)
        and math.isnan(outcome.low)
        and outcomes.shown(outcome) == "not finite"
    )


# The picture


def test_groups_are_compared_seed_by_seed(tmp_path):
    """Rewards 1, 2, 6 minus 0, 0, 3 are 1, 2, 3: mean 2, deviation 1, t 4.303 of two degrees, so 2
    -+ 4.303 / sqrt 3 = 2.484.
    """
    a = seeds(tmp_path, "a", [0.0], [0.0], [3.0], lr=1e-3)
    b = seeds(tmp_path, "b", [1.0], [2.0], [6.0], [9.0], lr=1e-4)  # the fourth seed has no other
    ((pairs, found),) = outcomes.differences(records.groups([records.read(path) for path in a + b]))
    assert pairs.label == "b minus a" and len(pairs.runs) == 3
    outcome = found["reward", "training"]
    assert (
        outcome[:3] == pytest.approx((2.0, -0.484, 4.484), abs=1e-3)
        and outcome.over == "3 paired seeds"
        and math.isnan(outcome.p)
    )
    report.write(a + b, tmp_path / "out")
    assert in_csv(tmp_path / "out")["b minus a", "", "reward", "training"] == pytest.approx(
        (2.0, -0.484, 4.484), abs=1e-3
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "b minus a (3 seeds)" in text and "paired by seed" in text


def test_a_difference_of_many_seeds_has_its_p(tmp_path):
    """Six differences above 0: two of 64 sign flips are so far from 0."""
    a, b = (
        seeds(tmp_path, "a", *[[0.0]] * 6, lr=1e-3),
        seeds(tmp_path, "b", *[[1.0 + k] for k in range(6)], lr=1e-4),
    )
    ((_, found),) = outcomes.differences(records.groups([records.read(path) for path in a + b]))
    assert found["reward", "training"].p == 2 / 64 and ", p 0.031" in outcomes.shown(
        found["reward", "training"]
    )


def test_seeds_that_cannot_be_paired_are_not_compared(tmp_path):
    read = lambda paths: records.groups([records.read(path) for path in paths])
    a, b = (
        seeds(tmp_path, "a", [0.0], [1.0], lr=1e-3),
        seeds(tmp_path, "b", [0.0], [math.nan], lr=1e-4),
    )
    ((_, found),) = outcomes.differences(
        read(a + b)
    )  # a run that diverged is no reason to leave the seed out
    assert math.isnan(found["reward", "training"].value)
    assert (
        outcomes.differences(read(a)) == outcomes.differences(read(a + b[:1])) == []
    )  # one group; one pair
    twice = a_run(
        tmp_path / "b-again", RunConfig(steps=1, lr=1e-4, seed=0), metrics_jsonl=rows([0.5])
    )
    assert outcomes.differences(read([*a, *b, twice])) == []  # which of the two?


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


# The whole report


def test_tokens_in_training_are_words_on_validation(tmp_path):
    run = a_run(
        tmp_path / "one",
        RunConfig(steps=2),
        metrics_jsonl=rows([0.1, 0.2], length=7.0, validation_length=3.0),
    )
    report.write([run])
    text = (run / "report.md").read_text()
    assert re.search(r"length \(tokens a response\) \| training \| 7 ", text), text
    assert re.search(r"length \(words a response\) \| validation, last \| 3 ", text)


def test_several_groups(tmp_path):
    a, b = seeds(tmp_path, "a", [0.0, 1.0], [0.0, 3.0]), seeds(tmp_path, "b", [5.0, 5.0], lr=0.5)
    files = report.write([*a, *b], tmp_path / "out")
    assert [file.name for file in files] == sorted(
        ["report.html", "report.md", "report.csv", "report.svg"], key=report.FILES.index
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(report.FILES)
    found = in_csv(tmp_path / "out")
    # means of both steps: .5 and 1.5 of the seeds; 1 ± 12.706 x .7071 / √2
    assert found["a", "", "reward", "training"] == pytest.approx((1.0, -5.353, 7.353), abs=1e-3)
    assert (
        found["a", "a-1", "reward", "training"][0] == 1.5
        and found["b-0", "b-0", "reward", "training"][0] == 5.0
    )
    page = Read((tmp_path / "out" / "report.html").read_text())
    assert page.harmless() and page.of("h1") == ["a and b-0"]
    cells = page.of("td")
    assert "1 [-5.35, 7.35]" in cells and "5" in cells
    # the settings in which they differ, with both values, and nothing else
    at = cells.index("lr")
    assert cells[at : at + 8] == ["lr", "0.001", "0.001", "0.5", "seed", "0", "0, 1", "0"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert (
        "| reward (score a response) | training | 1 \\[-5.35, 7.35\\] | 5 |" in text
        and "](report.svg)" in text
    )
    assert f"$ python SCRIPT.py --config {a[0]}/config.json --name NEW" in text


def test_a_task(tmp_path):
    """The report is in its folder; samples are the first ones, before and after."""
    root = a_task(tmp_path / "w", steps=9)
    report.write([root])
    page = Read((root / "report.html").read_text())
    cells = page.of("td")
    at = cells.index("p0")
    assert cells[at : at + 4] == ["p0", "yes", "no", "yes"] and "before: supervised" in page.of(
        "th"
    )
    assert "0.75 [0.25, 1]" in cells and "9.9" in cells and "0123456789" in cells
    assert "Note: w ends at step 3 of 9" in page.of("p") and "3 / 9" in cells
    assert "$ python SCRIPT.py --name NEW --lora 0 --steps 3 --task spelling" in page.of("pre")
    assert any("w: the first 4 of 4 held-out prompts, unselected." in text for text in page.of("p"))


def test_the_commands_of_a_run(tmp_path):
    commands = "python a.py --lr 1\npython a.py --lr 1 --resume\n"
    report.write([a_run(tmp_path / "a", command_txt=commands)])
    page = Read((tmp_path / "a" / "report.html").read_text())
    assert page.of("pre") == ["$ python a.py --lr 1\n$ python a.py --lr 1 --resume"]
    assert "a was started and resumed with:" in page.of("p")


def test_a_run_that_diverged_is_shown_and_counted(tmp_path):
    a = seeds(tmp_path, "a", [0.0, 1.0], [0.0, math.nan])
    report.write(a, tmp_path / "out")
    page = Read((tmp_path / "out" / "report.html").read_text())
    assert "Note: a-1 has 1 step with a non-finite number" in page.of("p")
    assert "not finite" in page.of("td")
    assert math.isnan(in_csv(tmp_path / "out")["a", "", "reward", "training"][0])


def test_runs_without_steps_and_repeated_seeds(tmp_path):
    a = seeds(tmp_path, "a", [0.0, 1.0])
    again = a_run(
        tmp_path / "again", RunConfig(steps=2), metrics_jsonl=rows([1.0, 1.0]) + "{half\n"
    )
    empty = a_run(tmp_path / "empty", RunConfig(steps=2, lr=1.0), metrics_jsonl="")
    report.write([*a, *a, again, empty], tmp_path / "out")
    said = Read((tmp_path / "out" / "report.html").read_text()).of("p")
    assert (
        "Note: a-0 and 1 more has a seed more than once; "
        "its interval takes these runs as independent" in said
    )
    assert (
        "Note: empty has no step yet" in said
        and "Note: again: metrics.jsonl: ignored 1 damaged line" in said
    )
    with pytest.raises(UserError, match=f"^no step yet in {empty}; there is nothing to report$"):
        report.write([empty])


def test_options_give_the_settings_back(tmp_path):
    mine = RunConfig(
        steps=7,
        kl_adaptive=False,
        resume=False,
        tiny=True,
        clip_low=0.1,
        loss_settings=(("tau", 1.5), ("b", 2.0)),
        lr=1e-5,
        model="a folder/with 'quotes'",
        algorithm="grpo",
        kl_coef=0.1,
    )
    assert cli.parse(RunConfig, args=shlex.split(sections.options(to_dict(mine)))) == mine


# Hostile runs


def test_a_hostile_run_does_no_harm(tmp_path):
    """Hostile names of runs, metrics and settings, versions, commands and texts."""
    number = dict.fromkeys(TEXTS, 0.5)
    root = tmp_path / "<script>$\\frac{$"
    root.mkdir()
    bad = TEXTS[0]
    config = to_dict(TaskConfig(task=bad, steps=3, name=TEXTS[18], model=TEXTS[5])) | {
        text: text for text in TEXTS
    }
    validation = {f"validation_{text}": 0.5 for text in TEXTS}
    a_run(root / "policy", config_json=json.dumps(config), metrics_jsonl=rows([0.1], **validation))
    (root / "policy" / "command.txt").write_bytes("\n".join(TEXTS).encode("utf-8", "surrogatepass"))
    (root / "outputs.jsonl").write_text(
        lines(*({"prompt": x, "supervised": x, "policy": x, "reference": x, x: x} for x in TEXTS))
    )
    result = {
        "supervised": number,
        "policy": number,
        "gain": {x: [0.5, 0.4, 0.6] for x in TEXTS},
        "versions": dict.fromkeys(TEXTS, bad),
    }
    (root / "result.json").write_text(json.dumps(result))
    report.write([root], tmp_path / "out")

    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert (
        Read(page).harmless()
        and "<script" not in page.lower()
        and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    )
    assert pages.visible(bad) in Read(page).of("td")
    reader = (
        pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    )
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert Read(reader.render(text)).harmless() and "\x1b" not in text
    svg = (tmp_path / "out" / "report.svg").read_text("utf-8")
    for element in ElementTree.fromstring(svg).iter():
        assert "script" not in element.tag and "foreignObject" not in element.tag
        assert not any(name.lower().startswith("on") for name in element.keys())  # noqa: SIM118
        links = [x for name, x in element.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)
    assert "<script" not in svg
    with (tmp_path / "out" / "report.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert len(cells) > 9 * 3 * len(TEXTS) - 9 and not any(
        re.match(r"\s*[=+\-@\uff1d]", cell) for cell in cells
    )


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = a_run(tmp_path / "a")

    def run(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["jaxppo", "report", *args])
        try:
            commands.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run(str(folder)) == 0
    assert (
        capsys.readouterr().out
        == f"written: {', '.join(str(folder / name) for name in report.FILES)}\n"
    )
    monkeypatch.chdir(tmp_path)
    b = a_run(tmp_path / "b", RunConfig(seed=1, steps=3))
    assert run(str(folder), str(b)) == 0 and (tmp_path / "report" / "report.html").exists()
    assert (
        run(str(folder), "--out", str(tmp_path / "x" / "y")) == 0
        and (tmp_path / "x" / "y" / "report.csv").exists()
    )
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    for args, words in (
        ([], "no runs; give at least one folder"),
        (["nowhere"], "no run in nowhere; give the folder"),
        (
            [str(folder), "--out", "file"],
            "cannot write to file (File exists); choose another --out folder",
        ),
    ):
        assert run(*args) == 2
        assert capsys.readouterr().err.startswith(f"error: {words}")
