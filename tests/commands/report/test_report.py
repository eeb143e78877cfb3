"""The report: its numbers, its picture, and that a hostile run does no harm."""

import csv
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hostile import TEXTS, Read
from report_runs import a_task, in_csv, rows, seeds
from runs import a_run, lines

from jaxppo import commands
from jaxppo.commands import report
from jaxppo.commands.report import pages
from jaxppo.config import RunConfig
from jaxppo.run.settings import to_dict
from jaxppo.tasks import TaskConfig


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
    assert "w has no command.txt. Its settings are in result.json." in page.of("p")
    assert any("w: the first 4 of 4 held-out prompts, unselected." in text for text in page.of("p"))


def test_a_run_that_diverged_is_shown_and_counted(tmp_path):
    a = seeds(tmp_path, "a", [0.0, 1.0], [0.0, math.nan])
    report.write(a, tmp_path / "out")
    page = Read((tmp_path / "out" / "report.html").read_text())
    assert "Note: a-1 has 1 step with a non-finite number" in page.of("p")
    assert "not finite" in page.of("td")
    assert math.isnan(in_csv(tmp_path / "out")["a", "", "reward", "training"][0])


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
