"""Trackers beside metrics.jsonl: what they are given, what they are not, and that none of them ends
a run.
"""

import importlib.machinery
import json
import math
import os
import struct
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from runs import RUN

from jaxppo import cli, config
from jaxppo.errors import UserError
from jaxppo.run import files, trackers
from jaxppo.tasks import TaskConfig, stages

ROW = {"reward": 0.5, "kl": 1.25, "tokens_per_second": 100.0}
WANDB = (
    "WANDB_MODE",
    "WANDB_API_KEY",
    "WANDB_IDENTITY_TOKEN_FILE",
    "WANDB_BASE_URL",
    "WANDB_PROJECT",
)


def rows(*steps: int, **changes: float) -> list[dict[str, float]]:
    return [{"step": k, **ROW, "reward": k / 10, **changes} for k in steps]


def opened(folder: Path, names: str, *, first_step: int = 0) -> trackers.TrackedLog:
    own = replace(RUN, track=names)
    return trackers.TrackedLog(own, folder, first_step=first_step, total_steps=9)


def record(folder: Path) -> list[dict]:
    return files.read_metrics(folder)


# Which


def test_without_any_the_log_is_a_file(tmp_path):
    log = opened(tmp_path, "")
    assert log.trackers == {}
    log.log(rows(1))
    log.close()
    assert record(tmp_path) == rows(1) and [x.name for x in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert config.tracker_names(replace(RUN, track=" ")) == ()


def package(monkeypatch, name: str, **contents) -> types.ModuleType:
    """A module in the place of a package, whether that is installed or not."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="fake")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_names(monkeypatch):
    package(monkeypatch, "wandb")
    package(monkeypatch, "tensorboardX")
    assert config.tracker_names(replace(RUN, track="wandb, tensorboard,wandb")) == (
        "wandb",
        "tensorboard",
    )
    assert set(trackers.TRACKERS) == set(config.TRACKERS)
    with pytest.raises(UserError, match=r"^--track 'mlflow': choose among tensorboard, wandb$"):
        config.validate_run(replace(RUN, track="wandb,mlflow"))


@pytest.mark.parametrize(("name", "module"), config.TRACKERS.items())
def test_a_missing_package_is_told_of_before_anything_is_written(
    tmp_path, monkeypatch, capsys, name, module
):
    monkeypatch.setitem(sys.modules, module, None)
    want = f'--track {name} needs the package {module}: pip install -e ".[track]"'
    with pytest.raises(UserError) as caught:
        stages.run(TaskConfig(task="spelling", runs=str(tmp_path / "runs"), track=name))
    assert str(caught.value) == want
    with pytest.raises(SystemExit) as stop:  # as a script says it

        def main(options):
            config.validate_run(options)

        cli.script(main, TaskConfig, args=["--track", name, "--runs", str(tmp_path / "runs")])
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {want}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_mere_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    """W&B leaves one where it was started."""
    (tmp_path / "wandb").mkdir()
    for name in [x for x in sys.modules if x.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="needs the package wandb"):
        config.tracker_names(replace(RUN, track="wandb"))


def test_it_may_change_when_a_run_goes_on():
    assert "track" in config.FREE


# A tracker that fails


class Failing:
    """A sink that raises at its k-th call; `close` is one, too."""

    def __init__(self, at: int):
        self.at, self.calls, self.seen, self.closed = at, 0, [], False

    def __call__(self, settings, folder, say):
        self.count()
        return self

    def count(self):
        self.calls += 1
        if self.calls == self.at:
            raise ConnectionError("no route to host\nand more")

    def log(self, rows):
        self.count()
        self.seen += [row["step"] for row in rows]

    def close(self):
        self.count()
        self.closed = True


@pytest.mark.parametrize(
    ("at", "seen"), [(1, []), (2, []), (3, []), (4, [1]), (5, [1, 2]), (6, [1, 2])]
)
def test_one_that_fails_is_left_out_with_one_warning(tmp_path, monkeypatch, capsys, at, seen):
    """At its start, with the lines before (none), at the first step, the second, the end, never."""
    sink, other = Failing(at), Failing(99)
    package(monkeypatch, "wandb")
    package(monkeypatch, "tensorboardX")
    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": sink, "tensorboard": other})
    log = opened(tmp_path, "wandb,tensorboard")
    log.log(rows(1))
    log.log(rows(2))
    log.say("news")
    log.close()
    shown = capsys.readouterr().out.splitlines()
    warning = (
        "warning: --track wandb is left out from here on (no route to host); metrics.jsonl has "
        "every step"
    )
    assert shown.count(warning) == (at < 6) and "news" in shown
    assert sink.seen == seen and sink.closed == (at == 6)
    assert other.seen == [1, 2] and other.closed
    assert record(tmp_path) == rows(1, 2)


def test_the_record_itself_may_end_a_run(tmp_path, monkeypatch):
    package(monkeypatch, "wandb")
    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": Failing(99), "tensorboard": Failing(99)})
    log = opened(tmp_path, "wandb")
    log.file.close()
    log.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        log.log(rows(1))
    log.close()


# TensorBoard


def scalars(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Every value in the event files, by name and step. A record is length, its checksum, an Event,
    its checksum.
    """
    from tensorboardX.proto import event_pb2

    found: dict[tuple[str, int], list[float]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault((value.tag, event.step), []).append(value.simple_value)
            data = data[16 + length :]
    return found


def same_as_record(folder: Path) -> bool:
    """Every number of the record once, and no other; to the last bit of a float32."""
    single = lambda x: struct.unpack("<f", struct.pack("<f", x))[0]
    want = {
        (name, row["step"]): [single(x)]
        for row in record(folder)
        for name, x in row.items()
        if name != "step"
    }
    return json.dumps(sorted(scalars(folder).items())) == json.dumps(sorted(want.items()))


def test_tensorboard_has_what_the_record_has(tmp_path):
    pytest.importorskip("tensorboardX")
    log = opened(tmp_path, "tensorboard")
    log.log(rows(1))
    log.log(rows(2, 3, validation_score=0.1) + rows(4, kl=math.nan))
    assert same_as_record(tmp_path)  # at once: a process that is killed has written what it logged
    log.close()
    assert len(record(tmp_path)) == 4 and math.isnan(scalars(tmp_path)["kl", 4][0])


def test_tensorboard_of_a_run_that_goes_on(tmp_path):
    """From the checkpoint of step 2, after step 4: 3 and 4 come again, and are other ones."""
    pytest.importorskip("tensorboardX")
    log = opened(tmp_path, "tensorboard")
    log.log(rows(1, 2, 3, 4))
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(
        events.with_name("events.out.tfevents.1.host")
    )  # its name has the second in which it was begun
    log = opened(tmp_path, "tensorboard", first_step=2)
    assert same_as_record(tmp_path) and max(step for _, step in scalars(tmp_path)) == 2
    log.log(rows(3, 4, 5, kl=7.0))
    log.close()
    assert same_as_record(tmp_path) and scalars(tmp_path)["kl", 3] == [7.0]
    (tmp_path / "tensorboard" / "mine.txt").write_text("")
    opened(tmp_path, "tensorboard", first_step=5).close()
    assert (tmp_path / "tensorboard" / "mine.txt").exists()


def test_tensorboard_on_a_full_disk(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    log = opened(tmp_path, "tensorboard")
    sink = log.trackers["tensorboard"]
    assert isinstance(sink, trackers.TensorBoard)
    inner = sink.writer._py_recordio_writer
    inner._writer.close()
    with open("/dev/full", "wb", buffering=0) as inner._writer:
        for k in range(1, 4):
            log.log(rows(k))
        log.close()
    assert record(tmp_path) == rows(1, 2, 3)
    assert (
        capsys.readouterr().out.count(
            "warning: --track tensorboard is left out from here on ([Errno 28] No space left"
        )
        == 1
    )


# W&B, without its package


class Fake:
    """What `wandb.init` gives, and a server that takes no step twice; `answers` says whether it
    does.
    """

    def __init__(self, monkeypatch, folder: Path, *, has: int = 0, answers: bool = True):
        self.folder, self.has, self.answers = folder, has, answers
        self.begun: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        package(monkeypatch, "wandb", init=self.init, Settings=lambda **settings: settings)
        for name in WANDB:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(folder / "no-netrc"))

    def init(self, **given):
        self.begun.append(given)
        if given["mode"] != "offline" and not self.answers:
            raise ConnectionError("timed out")
        self.offline = given["mode"] == "offline"
        self.step = 0 if self.offline else self.has
        self.url = "https://example.org/run"
        self.dir = self.folder / "wandb" / f"offline-run-{len(self.begun)}-{given['id']}" / "files"
        self.dir.mkdir(parents=True)
        return self

    def log(self, numbers, *, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.logged.append((-1, {}))


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_MODE": "online"}, "", "offline"),  # it would ask for a key
        ({"WANDB_API_KEY": "k"}, "", None),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_MODE": "disabled"}, "", "disabled"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "", "disabled"),
        ({}, "machine api.wandb.ai login user password k", None),
        ({}, "machine example.org login user password k", "offline"),
        (
            {"WANDB_BASE_URL": "https://example.org"},
            "machine example.org login user password k",
            None,
        ),
        ({}, "nonsense", "offline"),
    ],
)
def test_nothing_is_sent_unless_the_environment_says_so(
    tmp_path, monkeypatch, capsys, environment, netrc, mode
):
    fake = Fake(monkeypatch, tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "no-netrc").write_text(netrc + "\n")
    (tmp_path / "no-netrc").chmod(0o600)
    opened(tmp_path, "wandb").close()
    assert [given["mode"] for given in fake.begun] == [mode]
    said = capsys.readouterr().out
    assert ("there is no API key" in said) == (
        mode == "offline" and environment.get("WANDB_MODE") != "offline"
    )
    assert (f"wandb sync {tmp_path}/wandb/offline-run-1-" in said) == (mode == "offline")


def test_numbers_and_settings_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "of the user")
    fake = Fake(monkeypatch, tmp_path)
    log = opened(tmp_path, "wandb")
    log.log(rows(1, 2))
    log.say("secret words")
    log.close()
    (given,) = fake.begun
    settings = given["settings"]
    assert (
        settings["console"] == "off"
        and settings["save_code"] is False
        and settings["x_disable_meta"] is True
    )
    assert (
        given["dir"] == str(tmp_path)
        and given["project"] == "jaxppo"
        and given["config"]["lr"] == RUN.lr
    )
    assert fake.logged == [(k, {**ROW, "reward": k / 10}) for k in (1, 2)] + [(-1, {})]
    assert "secret words" not in str(fake.begun) + str(fake.logged)
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_a_run_that_goes_on_sends_what_is_new(tmp_path, monkeypatch):
    """The server has steps 1 to 3 (its next is 4), the record of the checkpoint 1 and 2; then it
    has lost all but 1.
    """
    fake = Fake(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    log = opened(tmp_path, "wandb")
    log.log(rows(1, 2, 3))
    log.close()
    fake.logged, fake.has = [], 4
    log = opened(tmp_path, "wandb", first_step=2)
    log.log(rows(3, 4))
    log.close()
    assert [step for step, _ in fake.logged] == [4, -1]
    fake.logged, fake.has = [], 2
    log = opened(tmp_path, "wandb", first_step=4)
    log.log(rows(5))
    log.close()
    assert [step for step, _ in fake.logged] == [2, 3, 4, 5, -1]
    assert len({given["id"] for given in fake.begun}) == 1 and all(
        given["resume"] == "allow" for given in fake.begun
    )


def test_offline_a_run_that_goes_on_is_written_again_as_a_whole(tmp_path, monkeypatch):
    fake = Fake(monkeypatch, tmp_path)
    log = opened(tmp_path, "wandb")
    log.log(rows(1, 2, 3))
    log.close()
    (tmp_path / "wandb" / "offline-run-0-another").mkdir()
    fake.logged = []
    log = opened(tmp_path, "wandb", first_step=2)
    log.log(rows(3, 4))
    log.close()
    assert [step for step, _ in fake.logged] == [1, 2, 3, 4, -1]
    name = fake.begun[0]["id"]
    left = sorted(path.name for path in (tmp_path / "wandb").iterdir())
    assert left == ["offline-run-0-another", f"offline-run-2-{name}", "run-id.txt"]


def test_a_server_that_does_not_answer(tmp_path, monkeypatch, capsys):
    fake = Fake(monkeypatch, tmp_path, answers=False)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    log = opened(tmp_path, "wandb")
    log.log(rows(1))
    log.close()
    assert [given["mode"] for given in fake.begun] == [None, "offline"] and [
        step for step, _ in fake.logged
    ] == [1, -1]
    assert (
        "warning: W&B does not answer (timed out): it is written offline" in capsys.readouterr().out
    )


# W&B itself

REAL = """
import os, sys
from pathlib import Path
from dataclasses import replace
from jaxppo.config import RunConfig
from jaxppo.run import trackers
folder = Path(sys.argv[1])
for first in (0, 2):
    own = replace(RunConfig(), track="wandb")
    log = trackers.TrackedLog(own, folder, first_step=first, total_steps=4)
    log.say("SECRETWORDS")
    row = {"reward": 0.5, "kl_of_this_test": float("nan"), "tokens_per_second": 9.0}
    log.log([{"step": k, **row} for k in (first + 1, first + 2)])
    print("SECRETWORDS")
    log.close()
"""


@pytest.mark.ci
def test_wandb_offline_stays_in_the_runs_folder(tmp_path):
    """In a process of its own, since it starts another one."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    home, folder = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    folder.mkdir()
    environment = {k: x for k, x in os.environ.items() if k not in WANDB} | {
        "HOME": str(home),
        "WANDB_MODE": "offline",
    }
    command = [sys.executable, "-c", REAL, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=home, timeout=120
    )
    assert done.returncode == 0 and "warning" not in done.stdout + done.stderr, (
        done.stdout + done.stderr
    )
    (place,) = (folder / "wandb").glob("offline-run-*")
    assert f"wandb sync {place}" in done.stdout
    written = {path: path.read_bytes() for path in (folder / "wandb").rglob("*") if path.is_file()}
    (data,) = [x for path, x in written.items() if path.suffix == ".wandb"]
    assert data.count(b"kl_of_this_test") >= 4  # the lines of both sittings
    assert not any(b"SECRETWORDS" in x for x in written.values())
    assert not [
        path for path in home.rglob("*wandb*") if path.is_dir() and "offline-run" in path.name
    ]
