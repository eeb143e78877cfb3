import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxppo.config import RunConfig
from jaxppo.errors import UserError
from jaxppo.run import files


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


def test_a_run_to_resume_that_has_not_begun_is_a_new_one(tmp_path, capsys):
    assert files.run_folder(tmp_path, "b", resume=True).is_dir()
    files.write_config(tmp_path / "b", {})
    files.run_folder(tmp_path, "b", resume=True)
    said = f"new run: {tmp_path / 'b'}\nresuming {tmp_path / 'b'}\n"
    assert capsys.readouterr().out == said


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


def test_read_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    assert files.read_jsonl(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')  # the process died while it wrote
    assert files.read_jsonl(path) == [{"step": 1}, {"step": 2}]


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


def test_a_commit_and_what_was_changed_since(tmp_path):
    commit = files.commit.__wrapped__  # without its memory
    (tmp_path / "code.py").write_text("a = 1\n")
    assert commit(tmp_path) == ""  # no checkout
    git = lambda *words: subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words],
        check=True,
        capture_output=True,
    )
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    first = commit(tmp_path)
    assert len(first) == 40 and files.commit(tmp_path) == first
    (tmp_path / "notes.txt").write_text("no code")
    assert commit(tmp_path) == first
    (tmp_path / "code.py").write_text("a = 2\n")
    assert commit(tmp_path) == first + "+changed"
    assert files.commit(tmp_path) == first  # what the process began with


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
    monkeypatch.setattr(files.processes, "broadcast_int", lambda value: 0)
    (tmp_path / "config.json").touch()
    assert not files.has_started(tmp_path)
    monkeypatch.undo()
    assert files.has_started(tmp_path)


def test_lines_of_json_end_at_line_feeds_only(tmp_path):
    rows = [{"text": "a\u2028b\x85c\x0bd"}, {"text": "e"}]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows), "utf-8")
    assert files.read_jsonl(path) == rows
    files.write_jsonl(path, rows[1:])
    assert files.read_jsonl(path) == rows[1:]


def test_metrics_are_json_and_their_null_is_nan(tmp_path):
    files.write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "kl": float("nan")}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "kl": null}\n'
    (row,) = files.read_metrics(tmp_path)
    assert row["step"] == 1 and row["kl"] != row["kl"]
