import json
import math
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from jaxppo.config import RunConfig
from jaxppo.errors import UserError
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


def test_run_folder_is_made_once(tmp_path):
    folder = files.run_folder(tmp_path / "runs", "a", resume=False)
    assert folder == tmp_path / "runs" / "a" and folder.is_dir()
    files.run_folder(tmp_path / "runs", "a", resume=False)  # nothing has begun in it
    files.write_config(folder, {"lr": 0.1})
    with pytest.raises(
        UserError, match="exists: choose another --name, or continue it with --resume"
    ):
        files.run_folder(tmp_path / "runs", "a", resume=False)
    assert files.run_folder(tmp_path / "runs", "a", resume=True) == folder


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        files.run_folder(tmp_path, "a", resume=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a b", "ä", "x" * 65, "a\n"])
def test_names_that_could_lead_elsewhere(tmp_path, name):
    with pytest.raises(UserError, match="--name"):
        files.run_folder(tmp_path, name, resume=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*--runs"):
        files.run_folder(tmp_path / "file", "a", resume=False)


def test_write_config(tmp_path):
    files.write_config(tmp_path, {"lr": 0.1})
    files.write_config(tmp_path, {"lr": 0.2})
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.2}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_read_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    assert files.read_jsonl(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')  # the process died while it wrote
    assert files.read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_line_a_step(tmp_path, capsys):
    tracker = log.FileLog(tmp_path, first_step=0, total_steps=3)
    tracker.log([{"step": 1, **ROW}])
    tracker.log([])
    tracker.log([{"step": 2, **ROW}, {"step": 3, **ROW, "kl": math.nan}])
    tracker.say("news")
    tracker.close()
    rows = files.read_jsonl(tmp_path / "metrics.jsonl")
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
    monkeypatch.setattr(files, "Console", lambda **options: Console(force_terminal=True, width=120))
    tracker = log.FileLog(tmp_path, first_step=0, total_steps=2)
    tracker.log([{"step": 1, **ROW}])
    tracker.say("[bold]not markup[/bold]")
    tracker.log([{"step": 2, **ROW}])
    tracker.close()
    shown = capsys.readouterr().out
    assert "[bold]not markup[/bold]" in shown
    assert "reward 0.500" in shown and "2/2" in shown


def test_samples_are_appended(tmp_path):
    tracker = log.FileLog(tmp_path, first_step=0, total_steps=1)
    tracker.samples([{"text": "ä\nb"}])
    tracker.samples([{"text": "c"}])
    tracker.close()
    assert files.read_jsonl(tmp_path / "samples.jsonl") == [{"text": "ä\nb"}, {"text": "c"}]


def test_a_table_reads_no_markup_and_obeys_no_control_characters(capsys):
    log.print_table("samples", ["prompt", "score"], [["[red]x[/red]\x1b[2J", "0.5"]])
    shown = capsys.readouterr().out
    assert "[red]x[/red]\\x1b[2J" in shown
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["experiments/sft.py", "--steps", "3", "--data", "a b.jsonl"],
            "python experiments/sft.py --steps 3 --data 'a b.jsonl'",
        ),
        (
            ["/opt/venv/bin/jaxppo", "plan"],
            "jaxppo plan",
        ),  # where it was found is not what was typed
        (["/home/me/x.py", "~/data"], "python /home/me/x.py '~/data'"),
        (["x.py", "--hub-token", "abc", "--lr", "1"], "python x.py --hub-token '***' --lr 1"),
        (
            ["x.py", "--API_KEY=abc", "--password", "--lr"],
            "python x.py '--API_KEY=***' --password '***'",
        ),
        (
            ["x.py", "--model", "https://me:abc@example.org/x"],
            "python x.py --model 'https://***@example.org/x'",
        ),
        (["x.py", "--tokens", "bpe", "--monkey", "b"], "python x.py --tokens bpe --monkey b"),
        (["x.py", "a\x1b[2J\nb"], "python x.py 'a\\x1b[2J b'"),
    ],
)
def test_a_command_as_it_was_typed_without_secrets(words, line):
    assert files.command_line(words) == line
    assert files.command_line(words, module="jaxppo.launch").startswith("python -m jaxppo.launch")


def test_each_start_of_a_run_is_a_line(tmp_path, monkeypatch):
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["a.py"])
    files.write_command(tmp_path)  # a notebook has no file
    assert list(tmp_path.iterdir()) == []
    main.__file__ = "a.py"
    files.write_command(tmp_path)
    monkeypatch.setattr(sys, "argv", ["a.py", "--resume"])
    files.write_command(tmp_path)
    assert (tmp_path / "command.txt").read_text() == "python a.py\npython a.py --resume\n"
    (tmp_path / "command.txt").write_bytes(b"\xff\n")  # damaged: no reason for a run to end
    files.write_command(tmp_path)
    assert (tmp_path / "command.txt").read_text() == "\ufffd\npython a.py --resume\n"


def test_lines_end_where_they_end_and_nowhere_else(tmp_path):
    tracker = log.FileLog(tmp_path, first_step=0, total_steps=1)
    tracker.samples([{"text": "a\u2028b\x85c\x0bd"}, {"text": "e"}])
    tracker.close()
    assert files.read_jsonl(tmp_path / "samples.jsonl") == [
        {"text": "a\u2028b\x85c\x0bd"},
        {"text": "e"},
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\nc", "a b c"),
        ("\x00\r\x1b]0;", "\\x00\\r\\x1b]0;"),
        ("é 漢 🙂", "é 漢 🙂"),
        ("a\u202eb", "a\\u202eb"),
    ],
)
def test_printable(text, expected):
    assert files.printable(text) == expected


@pytest.mark.parametrize("keys", [["reward"], [key for key, _, _ in log.PANELS]])
def test_curves(tmp_path, keys):
    rows = [{"step": k, **{key: k / 10 for key in keys}} for k in range(1, 13)]
    rows[5]["validation_reward"] = 0.7
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = log.plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:]) == (1440, 720)  # 12 x 6 inches at 120 dots


def test_running_mean():
    assert log._running_mean([1.0, 2.0, 3.0, 7.0], 2) == [1.0, 1.5, 2.5, 5.0]


def test_what_is_settled_is_in_a_closed_file(tmp_path):
    """A bucket that is mounted as a folder shows what was written when the file is closed."""
    log = FileLog(tmp_path, first_step=0, total_steps=2)
    log.log([{"step": 1, **ROW}])
    before = log.file
    log.settle()
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


def test_where_a_run_lies(tmp_path):
    """Its own folder, or the second stage of a task's whole way; a folder that has both is a
    run.
    """
    with pytest.raises(
        UserError,
        match="no run in .*; give the folder that holds its config.json, or that of a task",
    ):
        files.find_run(tmp_path)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    assert files.find_run(tmp_path) == tmp_path / "policy" == files.find_run(tmp_path / "policy")
    (tmp_path / "config.json").write_text("{}")
    assert files.find_run(tmp_path) == tmp_path


def test_a_record_is_kept_where_one_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.write_record("", "task/run", {"a": 1}) is None and list(tmp_path.iterdir()) == []
    place = files.write_record("results", "task/run", {"says": "déjà vu", "value": 0.5})
    assert place == Path("results/task/run.json")
    assert place.read_text(encoding="utf-8") == '{\n "says": "déjà vu",\n "value": 0.5\n}\n'
    files.write_record(str(tmp_path), "b", {"value": float("nan"), "interval": [1.0, float("inf")]})
    assert json.loads((tmp_path / "b.json").read_text()) == {"value": None, "interval": [1.0, None]}


def test_a_commit_and_what_was_changed_since(tmp_path, monkeypatch):
    package = tmp_path / "jaxppo"
    package.mkdir()
    (package / "tracking.py").write_text("a = 1\n")
    monkeypatch.setattr(files, "__file__", str(package / "tracking.py"))
    assert files.versions()["git"] == ""  # no checkout
    git = lambda *words: subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words],
        check=True,
        capture_output=True,
    )
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    commit = files.versions()["git"]
    assert len(commit) == 40
    (tmp_path / "notes.txt").write_text("no code")
    assert files.versions()["git"] == commit
    (package / "tracking.py").write_text("a = 2\n")
    assert files.versions()["git"] == commit + "+changed"


def test_what_a_run_has_found(tmp_path):
    folder, config = (
        tmp_path / "runs" / "b",
        RunConfig(name="b", runs=str(tmp_path / "runs"), seed=3),
    )
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "seconds": 30}\n{"step": 2, "seconds": 15.3}\n{"step": 3, "sec'
    )
    files.write_result(folder, config, {"accuracy": 0.5}, results="", kind="task")
    assert json.loads((folder / "result.json").read_text()) == {"accuracy": 0.5}
    assert not (tmp_path / "task").exists()
    files.write_result(
        folder, config, {"accuracy": 0.5}, results=str(tmp_path / "kept"), kind="task", extra=[1]
    )
    record = json.loads((tmp_path / "kept" / "task" / "b.json").read_text())
    assert (
        record["result"] == {"accuracy": 0.5}
        and record["extra"] == [1]
        and record["versions"] == files.versions()
    )
    assert record["minutes"] == 0.76  # 45.3 seconds, without the half-written line: .755
    assert record["config"]["seed"] == 3 and "runs" not in record["config"]


def test_what_the_first_process_sees_is_begun(tmp_path, monkeypatch):
    """Which may write the settings between its look and another's."""
    assert not files.has_started(tmp_path)
    monkeypatch.setattr(tracking.processes, "broadcast_int", lambda value: 0)
    (tmp_path / "config.json").touch()
    assert not files.has_started(tmp_path)
    monkeypatch.undo()
    assert files.has_started(tmp_path)
