"""A pod of two hosts on this machine, with everything but Google's part.

The code is packed, unpacked and set up, and runs as two processes of one device each, with their
checkpoints in one bucket. The slice is preempted in the middle; later one host is told to stop. The
end equals that of an undisturbed run.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TIMING_KEYS

ROOT = Path(__file__).parents[2]
ZONE = ["--zone", "us-east5-b"]
pytestmark = pytest.mark.slow

OPTIONS = ["--steps", "60", "--save-every", "2", "--parallel", "pmap", "--expect-devices", "2"]
PROGRAMS = {
    # What setup_vm.sh would install: this Python, with the jaxppo that was unpacked.
    "uv": f"""#!/bin/bash
[ "$1" = venv ] || exit 0
mkdir -p .venv/bin
printf '#!/bin/bash\\nPYTHONPATH="$HOME/jaxppo" exec {sys.executable} "$@"\\n' >.venv/bin/python
chmod +x .venv/bin/python
""",
    "gcsfuse": '#!/bin/bash\nrmdir "${@: -1}"\nln -s "$BUCKETS/${@: -2:1}" "${@: -1}"\n',
    "mountpoint": '#!/bin/bash\n[ -L "$2" ]\n',
}


class Pod:
    """Two HOMEs, in which the commands for the hosts run; and the events of the test."""

    def __init__(self, folder: Path):
        self.folder, self.state, self.story, self.now, self.told = folder, "", [], 0.0, False
        self.metrics = folder / "buckets" / "my-bucket" / "runs" / "my-run" / "metrics.jsonl"
        (folder / "buckets" / "my-bucket").mkdir(parents=True)
        (folder / "bin").mkdir()
        for name, text in PROGRAMS.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    @property
    def homes(self) -> list[Path]:
        return [self.folder / f"host-{i}" for i in range(2)]

    def gcloud(self, argv, **_) -> subprocess.CompletedProcess:
        group, verb = (argv[3], argv[4]) if argv[1] == "compute" else ("", "")
        code, out = 0, ""
        if verb == "create":
            self.state = "ACTIVE"
            for home in self.homes:
                home.mkdir()
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                self.port = probe.getsockname()[1]
        elif verb == "delete":
            self.lose("")
        elif verb == "describe":
            found = (
                {"state": {"state": self.state}}
                if group == "queued-resources"
                else {"state": "READY"}
            )
            code, out = (0, json.dumps(found)) if self.state else (1, "")
        elif verb == "scp":
            for home in self.homes:
                shutil.copy(argv[-4], home / argv[-3].split(":")[1])
        elif verb == "ssh":
            code, out = self.ssh(
                next(word for word in argv if word.startswith("--command=")).split("=", 1)[1]
            )
        told = re.search(r"job\.sh (start|stop)|setup_vm", " ".join(argv))
        self.story += (
            [told[1] or "setup"] if told else [verb] if verb in ("create", "delete", "scp") else []
        )
        return subprocess.CompletedProcess(argv, code, out, "" if code == 0 else "NOT_FOUND")

    def ssh(self, command: str) -> tuple[int, str]:
        """On all hosts; the machine tells a process its number, as on a TPU VM."""
        env = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin",
            "BUCKETS": str(self.folder / "buckets"),
            "JAXPPO_PAGES": "/nowhere",
            "JAXPPO_COORDINATOR": f"localhost:{self.port}",
            "JAXPPO_PROCESSES": "2",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
        }
        done = []
        for i, home in enumerate(self.homes):
            own = env | {"HOME": str(home), "JAXPPO_PROCESS": str(i)}
            done.append(
                subprocess.run(
                    ["bash", "-c", command],
                    cwd=home,
                    env=own,
                    capture_output=True,
                    text=True,
                    timeout=120,
                )
            )
        assert not any("error" in one.stderr for one in done), done
        return max(one.returncode for one in done), "".join(one.stdout for one in done)

    def kill(self, number: int, *homes: Path) -> None:
        for home in homes:
            for pid in home.glob(".jaxppo-jobs/*/pid"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(pid.read_text()), number)

    def lose(self, state: str) -> None:
        """Remove the machines and their disks."""
        self.kill(signal.SIGKILL, *self.homes)
        for home in self.homes:
            for _ in range(50):
                shutil.rmtree(home, ignore_errors=True)
                if not home.exists():
                    break
                time.sleep(0.1)
        self.state = state

    def sleep(self, seconds: float) -> None:
        """Wait until the run reaches the next event, or has ended."""
        self.now += seconds
        lives = self.story.count("start")
        steps = 4 if lives == 1 else 8 if lives == 2 and not self.told else 1000
        for _ in range(1200):
            done = len(self.metrics.read_text().splitlines()) if self.metrics.exists() else 0
            if done >= steps or all(list(home.glob(".jaxppo-jobs/*/code")) for home in self.homes):
                break
            time.sleep(0.05)
        if lives == 1:
            self.lose("SUSPENDED")
        elif lives == 2 and not self.told:
            self.told = True  # a second time would end it at once, unsaved
            self.kill(signal.SIGTERM, self.homes[1])


def rows(path: Path) -> list[dict]:
    return [
        {k: x for k, x in json.loads(line).items() if k not in TIMING_KEYS}
        for line in path.read_text().splitlines()
    ]


def test_a_pod_ends_the_same_after_a_preemption(tmp_path, monkeypatch, capfd):
    import tpu

    pod = Pod(tmp_path)
    run = subprocess.run
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda argv, **how: (pod.gcloud if argv[0] == "gcloud" else run)(argv, **how),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pod.env").write_text(
        "JAX_PLATFORMS=cpu\nXDG_CACHE_HOME=/nowhere\n"
    )  # there are no TPUs here
    (tmp_path / "pod.env").chmod(0o600)
    job = [
        "--no-plan",
        "--env-file",
        "pod.env",
        "--",
        "tests/faulty.py",
        "--runs",
        "gs://my-bucket/runs",
        *OPTIONS,
    ]
    code = tpu.main(
        ["babysit", "my-run", *ZONE, "--type", "v4-16", *job],
        sleep=pod.sleep,
        clock=lambda: pod.now,
    )
    assert code == 0, capfd.readouterr()
    made = ["create", "scp", "setup", "scp", "stop", "start"]
    assert pod.story == [*made, "delete", *made, "stop", "start", "delete"]
    assert capfd.readouterr().out.count("saved and stopped; starting it again") == 1

    calm = [
        sys.executable,
        "-m",
        "jaxppo.launch",
        "--processes",
        "2",
        "--devices",
        "1",
        "tests/faulty.py",
        "--distributed",
        "on",
    ]
    subprocess.run(
        [*calm, "--runs", str(tmp_path / "calm"), "--name", "my-run", *OPTIONS],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert [row["step"] for row in rows(pod.metrics)] == list(range(1, 61))
    assert rows(pod.metrics) == rows(tmp_path / "calm" / "my-run" / "metrics.jsonl")
