import math

import pytest
from rich.console import Console

from jaxppo.run import files, log
from jaxppo.run.log import FileLog

ROW = {
    "reward": 0.5,
    "kl": 1.25,
    "entropy": 2.0,
    "clip_fraction": 0.125,
    "length": 4.0,
    "tokens_per_second": 100.0,
}


def test_a_line_a_step(tmp_path, capsys):
    tracker = log.FileLog(tmp_path, first_step=0, total_steps=3)
    tracker.log([{"step": 1, **ROW}])
    tracker.log([])
    tracker.log([{"step": 2, **ROW}, {"step": 3, **ROW, "kl": math.nan}])
    tracker.say("news")
    tracker.close()
    rows = files.read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0] == {"step": 1, **ROW}
    assert math.isnan(rows[2]["kl"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(
        "step 1/3  reward 0.500  KL 1.25  entropy 2.00  clip 0.125  100 tok/s  left "
    )
    assert lines[-1] == "news"


def test_lines_after_the_checkpoint_go(tmp_path):
    tracker = log.FileLog(tmp_path, first_step=0, total_steps=4)
    tracker.log([{"step": k, **ROW} for k in (1, 2, 3)])
    tracker.close()
    tracker = log.FileLog(tmp_path, first_step=2, total_steps=4)
    assert [row["step"] for row in files.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    tracker.log([{"step": 3, **ROW, "reward": 9.0}])
    tracker.close()
    rows = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["reward"]) for row in rows] == [(1, 0.5), (2, 0.5), (3, 9.0)]


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log, "Console", lambda **options: Console(force_terminal=True, width=120))
    tracker = log.FileLog(tmp_path, first_step=0, total_steps=2)
    tracker.log([{"step": 1, **ROW}])
    tracker.say("[bold]not markup[/bold]")
    tracker.log([{"step": 2, **ROW}])
    tracker.close()
    shown = capsys.readouterr().out
    assert "[bold]not markup[/bold]" in shown
    assert "reward 0.500" in shown and "2/2" in shown


def test_a_table_reads_no_markup_and_obeys_no_control_characters(capsys):
    log.print_table("samples", ["prompt", "score"], [["[red]x[/red]\x1b[2J", "0.5"]])
    shown = capsys.readouterr().out
    assert "[red]x[/red]\\x1b[2J" in shown
    assert "\x1b[2J" not in shown


def test_what_is_flushed_is_in_a_closed_file(tmp_path):
    """A bucket that is mounted as a folder shows what was written when the file is closed."""
    log = FileLog(tmp_path, first_step=0, total_steps=2)
    log.log([{"step": 1, **ROW}])
    before = log.file
    log.flush()
    assert before.closed and not log.file.closed
    log.log([{"step": 2, **ROW}])
    log.close()
    assert [row["step"] for row in files.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_full_disk_is_told_of_once(tmp_path):
    """The write says so; closing the file, which would write the rest again, does not say it over
    the run's own error.
    """
    log = FileLog(tmp_path, first_step=0, total_steps=2)
    log.file.close()
    log.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        log.log([{"step": 1, **ROW}])
    log.close()
