"""job.sh on this machine, with its own HOME and a fake Python: start, watch, stop, resume."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What the hosts would run; it writes down how it was called, and does what its script's name says.
PYTHON = """#!/bin/bash
printf '%s\\n' "$@" >>"$HOME/called"; echo "--" >>"$HOME/called"; env >"$HOME/environment"
case $1 in
  wait.py) trap 'echo saved; exit 75' TERM; echo waiting; while :; do sleep 0.05; done ;;
  deaf.py) trap '' TERM; echo waiting; while :; do sleep 0.05; done ;;
  *) echo working; echo oops >&2; exit "${1%.py}" ;;
esac
"""
GCSFUSE = (
    '#!/bin/bash\necho "$@" >>"$HOME/mounts"; point="${@: -1}"; touch '
    '"$point/.mounted"; exit "${GCSFUSE_CODE:-0}"\n'
)
MOUNTPOINT = '#!/bin/bash\n[ -e "$2/.mounted" ]\n'


class Host:
    """A machine: a HOME with the repository, after setup_vm.sh."""

    def __init__(self, home: Path):
        self.home, self.repository = home, home / "jaxppo"
        for name, text in {
            "jaxppo/.venv/bin/python": PYTHON,
            "bin/gcsfuse": GCSFUSE,
            "bin/mountpoint": MOUNTPOINT,
        }.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
            (home / name).chmod(0o755)
        (self.repository / "tpu").mkdir()
        shutil.copy(ROOT / "tpu" / "job.sh", self.repository / "tpu")
        self.env = {
            "HOME": str(home),
            "PATH": f"{home}/bin:/usr/bin:/bin",
            "JAXPPO_STOP_SECONDS": "1",
        }

    def job(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        argv = ["bash", "jaxppo/tpu/job.sh", *words]
        return subprocess.run(
            argv, cwd=self.home, env=self.env | env, capture_output=True, text=True, timeout=20
        )

    def status(self, name: str = "r") -> str:
        host, text = (
            self.job("status", name).stdout.removeprefix("jaxppo-host ").strip().split(" ", 1)
        )
        assert host
        return text

    def until(self, text: str, name: str = "r") -> None:
        for _ in range(200):
            if self.status(name) == text:
                return
            time.sleep(0.02)
        raise AssertionError(
            f"{self.status(name)}, not {text}: "
            f"{(self.home / '.jaxppo-jobs' / name / 'log').read_text()}"
        )

    def until_it_says(self, text: str) -> None:
        log = self.home / ".jaxppo-jobs" / "r" / "log"
        for _ in range(200):
            if log.exists() and text in log.read_text():
                return
            time.sleep(0.02)
        raise AssertionError(f"never said {text}")

    @property
    def called(self) -> list[list[str]]:
        return [
            call.split("\n")[:-1] for call in (self.home / "called").read_text().split("--\n")[:-1]
        ]


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    yield host
    for pid in tmp_path.glob(".jaxppo-jobs/*/pid"):
        host.job("stop", pid.parent.name)


def test_a_log_and_an_exit_code(host):
    assert host.status() == "none"
    assert host.job("start", "r", "--", "python", "76.py", "--name", "r").returncode == 0
    host.until("exit 76")
    folder = host.home / ".jaxppo-jobs" / "r"
    assert (folder / "code").read_text() == "76\n" and folder.stat().st_mode & 0o077 == 0
    assert [
        line for line in (folder / "log").read_text().splitlines() if "python 76.py" not in line
    ] == ["working", "oops"]
    assert host.job("log", "r", "2").stdout == "working\noops\n"
    name = os.uname().nodename
    assert host.job("log", "r", "2", "named").stdout == f"{name}: working\n{name}: oops\n"
    assert host.job("log", "s", "2", "named").returncode != 0  # there is none
    assert host.called == [["76.py", "--name", "r"]]


def test_stop_lets_the_run_save(host):
    host.job("start", "r", "--", "python", "wait.py")
    host.until_it_says("waiting")
    assert host.status() == "running"
    assert host.job("stop", "r").stdout.endswith(" exit 75\n")
    assert "saved" in host.job("log", "r").stdout


def test_stop_kills_a_run_that_ignores_it(host):
    host.job("start", "r", "--", "python", "deaf.py")
    host.until_it_says("waiting")
    assert host.job("stop", "r").stdout.endswith(" exit 137\n")


def test_started_once_and_one_run_at_a_time(host):
    host.job("start", "r", "--", "python", "wait.py")
    host.until_it_says("waiting")
    assert "is running already" in host.job("start", "r", "--", "python", "wait.py").stdout
    other = host.job("start", "s", "--", "python", "0.py")
    assert other.returncode == 2 and "r is running here; stop it first" in other.stderr
    assert len(host.called) == 1
    assert host.job("stop", "s").stdout.endswith(" none\n")


def test_a_run_is_lost_after_a_restart_of_the_machine(host):
    """Nothing runs, there is no exit code, and another process may have the process id."""
    host.job("start", "r", "--", "python", "wait.py")
    host.until_it_says("waiting")
    pid = int((host.home / ".jaxppo-jobs" / "r" / "pid").read_text())
    os.killpg(pid, signal.SIGKILL)
    host.until("lost")
    (host.home / ".jaxppo-jobs" / "r" / "pid").write_text(f"{os.getpid()}\n")
    assert host.status() == "lost"
    assert host.job("start", "r", "--", "python", "0.py").returncode == 0
    host.until("exit 0")


def test_a_started_run_is_resumed(host):
    command = ["exec", "--", "python", "0.py", "--name", "a", "--runs", "out"]
    host.job(*command)
    (host.repository / "out" / "a").mkdir(
        parents=True
    )  # made, but without its settings: it has not begun
    host.job(*command)
    (host.repository / "out" / "a" / "config.json").touch()  # killed before its first checkpoint
    host.job(*command)
    host.job(*command, "--resume")
    (host.repository / "out" / "b" / "supervised").mkdir(parents=True)  # a task's whole way
    host.job("exec", "--", "python", "0.py", "--name=b", "--runs=out")
    given = ["0.py", "--name", "a", "--runs", "out"]
    assert host.called == [
        given,
        given,
        [*given, "--resume"],
        [*given, "--resume"],
        ["0.py", "--name=b", "--runs=out", "--resume"],
    ]


def test_a_bucket_is_mounted_once(host):
    command = ["exec", "--", "python", "0.py", "--name", "a", "--runs", "gs://my-bucket/some/runs"]
    point = host.home / "gs" / "my-bucket"
    assert host.job(*command).returncode == 0
    (point / "some/runs/a").mkdir(parents=True)
    (point / "some/runs/a/config.json").touch()
    assert host.job(*command).returncode == 0
    mounts = (host.home / "mounts").read_text().splitlines()
    assert len(mounts) == 1 and mounts[0].endswith(f" my-bucket {point}")
    assert (
        "--implicit-dirs --metadata-cache-ttl-secs=0" in mounts[0]
    )  # another host's new file is seen at once
    there = ["--runs", "gs://my-bucket/some/runs", "--runs", f"{point}/some/runs"]
    assert host.called == [
        ["0.py", "--name", "a", *there],
        ["0.py", "--name", "a", *there, "--resume"],
    ]
    assert not list(point.glob(".jaxppo-probe*"))


@pytest.mark.skipif(
    os.getuid() != 0,
    reason="a read-only folder is made by mounting, or is read-only to nobody but others",
)
def test_a_bucket_that_cannot_be_written(host):
    point = host.home / "gs" / "my-bucket"
    point.mkdir(parents=True)
    (point / ".mounted").touch()
    probe = point / f".jaxppo-probe-{os.uname().nodename}"
    probe.mkdir()  # nothing can be written there
    done = host.job("exec", "--", "python", "0.py", "--runs", "gs://my-bucket/runs")
    assert (
        done.returncode == 2
        and "give this machine's service account the role roles/storage.objectUser" in done.stderr
    )


def test_a_bucket_that_cannot_be_mounted(host):
    command = ["exec", "--", "python", "0.py", "--runs", "gs://my-bucket/runs"]
    done = host.job(*command, GCSFUSE_CODE="1", JAXPPO_MOUNT_SECONDS="0")
    assert (
        done.returncode == 1 and "gs://my-bucket cannot be mounted; does it exist" in done.stderr
    )  # it may pass
    assert len((host.home / "mounts").read_text().splitlines()) == 5
    (host.home / "bin" / "gcsfuse").unlink()
    (host.home / "gs" / "my-bucket" / ".mounted").unlink()
    done = host.job(*command)
    assert done.returncode == 2 and "gcsfuse is missing" in done.stderr
    assert not (host.home / "called").exists()
    host.job("start", "r", "--", *command[2:])
    host.until("exit 2")  # the same, where it is started detached


def test_the_environment_file_is_read_and_never_run(host):
    (host.home / ".jaxppo.env").write_text(
        "# mine\nTOKEN=a b=$(touch bad) `touch bad` 'x'\n\na[$(touch bad)]=1\nexport X=1\nLAST=2"
    )
    assert host.job("exec", "--", "python", "0.py").returncode == 0
    environment = (host.home / "environment").read_text().splitlines()
    assert {"TOKEN=a b=$(touch bad) `touch bad` 'x'", "LAST=2"} <= set(environment)
    assert not list(host.home.rglob("bad")) and "X=1" not in environment
    # as an editor on Windows saves it
    (host.home / ".jaxppo.env").write_bytes("\ufeffTOKEN=a\r\nLAST=2\r\n".encode())
    assert host.job("exec", "--", "python", "0.py").returncode == 0
    assert {b"TOKEN=a", b"LAST=2"} <= {*(host.home / "environment").read_bytes().split(b"\n")}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "NAME is 1 to 64 letters"),
        (["status", "a/b"], "NAME is 1 to 64 letters"),
        (["status", ".."], "NAME is 1 to 64 letters"),
        (["start", "r"], "no command; job.sh start NAME -- COMMAND..."),
        (["exec", "--"], "no command; job.sh exec -- COMMAND..."),
        (["dance", "r"], "one of start, status, stop, log, exec"),
    ],
)
def test_wrong_calls(host, words, complaint):
    done = host.job(*words)
    assert done.returncode == 2 and complaint in done.stderr


def test_a_machine_that_is_not_set_up(host):
    shutil.rmtree(host.repository / ".venv")
    done = host.job("start", "r", "--", "python", "0.py")
    assert done.returncode == 2 and "is not set up; run tpu/setup_vm.sh" in done.stderr
