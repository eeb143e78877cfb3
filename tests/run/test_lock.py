import errno
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from jaxppo.errors import UserError
from jaxppo.run import lock


def test_the_second_is_refused_and_told_the_owner(tmp_path):
    first = lock.RunLock(tmp_path)
    with pytest.raises(
        UserError,
        match=f"belongs to process {os.getpid()} on {socket.gethostname()}; wait for it, or choose",
    ):
        lock.RunLock(tmp_path)
    first.release()
    lock.RunLock(tmp_path).release()


HOLD = """
import sys, time
from pathlib import Path
from jaxppo.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_owner_holds_nothing(tmp_path, capsys):
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"belongs to process {owner.pid} "):
        lock.RunLock(tmp_path)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    mine = lock.RunLock(tmp_path)
    assert f"taking over {tmp_path} from process {owner.pid}" in capsys.readouterr().err
    mine.release()
    lock.RunLock(tmp_path).release()
    assert capsys.readouterr().err == ""  # what was released is not taken over


def test_an_owner_on_another_machine_is_believed_while_it_shows_life(tmp_path, capsys):
    """The kernel here knows nothing of its lock: a file system without locks."""
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"host": "far-away", "pid": 7}))
    with pytest.raises(UserError, match="belongs to process 7 on far-away"):
        lock.RunLock(tmp_path)
    path.write_text(json.dumps({"host": "far-away", "pid": 7}))
    old = time.time() - 61  # a minute is the limit
    os.utime(path, (old, old))
    lock.RunLock(tmp_path).release()
    assert "process 7 on far-away, which is gone" in capsys.readouterr().err


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """The kernel says that it knows no such call: the file's signs of life are all that is
    known.
    """

    def unknown(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    first = lock.RunLock(tmp_path)
    with pytest.raises(UserError, match=f"belongs to process {os.getpid()}"):
        lock.RunLock(tmp_path)
    first.release()
    lock.RunLock(tmp_path).release()


def test_a_folder_that_is_gone_is_released(tmp_path):
    (tmp_path / "run").mkdir()
    held = lock.RunLock(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    held.release()


def test_the_owner_is_written_by_a_file_that_is_closed(tmp_path):
    """In a bucket that is mounted as a folder, what an open file was given is not there for others:
    this one is given nothing.
    """
    mine = lock.RunLock(tmp_path)
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert mine.file.tell() == 0
    assert (
        os.fstat(mine.file.fileno()).st_ino == (tmp_path / "lock.json").stat().st_ino
    )  # it is the same file that is locked
    mine.release()
    assert (tmp_path / "lock.json").read_text() == ""


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    mine = lock.RunLock(tmp_path)
    os.utime(tmp_path / "lock.json", (0, 0))
    deadline = time.monotonic() + 5
    while (tmp_path / "lock.json").stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mine.release()


@pytest.mark.parametrize("text", ["", "[1]", "{half", "\x00"])
def test_a_lock_file_that_says_nothing(tmp_path, text):
    (tmp_path / "lock.json").write_text(text)
    lock.RunLock(tmp_path).release()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot write to"):
        lock.RunLock(tmp_path / "nothing")
