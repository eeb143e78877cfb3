import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxppo import launch

SHOW = """
import os, sys
names = ("JAXPPO_PROCESS", "JAXPPO_PROCESSES", "JAX_NUM_CPU_DEVICES")
print(*(os.environ[name] for name in names), sys.argv[1:])
print("complaint", file=sys.stderr)
sys.exit(int(sys.argv[1]) if os.environ["JAXPPO_PROCESS"] == "1" else 0)
"""


def launched(folder: Path, source: str, *args: str) -> subprocess.Popen:
    (folder / "script.py").write_text(source)
    command = [
        sys.executable,
        "-m",
        "jaxppo.launch",
        "--processes",
        "2",
        "--devices",
        "3",
        str(folder / "script.py"),
        *args,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.ci
@pytest.mark.parametrize("code", [0, 2, 75])
def test_output_and_exit_code(tmp_path, code):
    process = launched(tmp_path, SHOW, str(code), "--steps", "3")
    out, err = process.communicate(timeout=60)
    assert out == f"0 2 3 ['{code}', '--steps', '3']\n"  # the first process alone
    assert sorted(err.splitlines()) == ["[1] complaint", "complaint"]
    assert process.returncode == code


@pytest.mark.ci
def test_signals_are_passed_on(tmp_path):
    """Each process says 75 to SIGTERM."""
    wait = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[1] + os.environ["JAXPPO_PROCESS"], "w").close()
time.sleep(60)
"""
    process = launched(tmp_path, wait, str(tmp_path / "ready"))
    while not ((tmp_path / "ready0").exists() and (tmp_path / "ready1").exists()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_the_rest_is_ended_when_one_fails():
    """Grace over, the other is killed; a signal is 128 + its number; the first bad code counts."""
    start = lambda code: subprocess.Popen([sys.executable, "-c", code])
    assert (
        launch.wait([start("import time; time.sleep(60)"), start("raise SystemExit(3)")], grace=0.2)
        == 3
    )
    assert launch.wait([start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")]) == 137
    assert launch.wait([start("pass"), start("pass")]) == 0


@pytest.mark.parametrize("options", [["--processes", "0", "x.py"], ["--devices", "0", "x.py"], []])
def test_wrong_options(options, capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(options)
    assert stop.value.code == 2
