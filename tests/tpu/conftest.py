"""Fixtures with a fake gcloud. tpu/ is not a package, so its folder is added to the path."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tpu"))
ZONE = ["--zone", "us-east5-b"]


class Cloud:
    """A fake gcloud, a clock that only `sleep` moves, and tpu.py in this process."""

    def __init__(self, folder: Path):
        self.folder, self.now, self.slept, self.asked, self.answers = (
            folder,
            1_000_000.0,
            [],
            [],
            [],
        )
        self.cache = folder.parent / "cache" / "jaxppo" / "tpu" / "my-run"
        self.play()

    def play(
        self,
        *lives: list[str],
        there: bool = False,
        hosts: int = 1,
        type: str = "v6e-8",
        born: str = "",
        **errors: list[str],
    ) -> None:
        """Set the steps of each slice to be created; `there`: the first one exists already."""
        world = {
            "lives": lives,
            "life": 0 if there else -1,
            "made": int(there),
            "step": -1,
            "hosts": hosts,
        }
        world |= {"type": type, "born": born, "errors": errors, "started": False, "ended": []}
        (self.folder / "world.json").write_text(json.dumps(world))
        (self.folder / "calls.jsonl").write_text("")

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def ask(self, question: str) -> str:
        self.asked.append(question)
        return self.answers.pop(0)

    def run(self, verb: str, *args: str, person: bool = False) -> int:
        import tpu

        cut = args.index("--") if "--" in args else len(args)
        given = [verb, "my-run", *ZONE, *args[:cut], *args[cut:]]
        return tpu.main(
            given, sleep=self.sleep, clock=lambda: self.now, ask=self.ask if person else None
        )

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    @property
    def story(self) -> list[str]:
        """The calls in one word each, without polls: create, delete, scp, and commands of hosts."""
        return [word for word in map(word_of, self.calls) if word]

    @property
    def started(self) -> list[str]:
        """The job's commands on the hosts."""
        commands = [
            word
            for call in self.calls
            for word in call
            if word.startswith("--command=") and "job.sh start" in word
        ]
        return [command.split(" -- ", 1)[1] for command in commands]


def word_of(call: list[str]) -> str:
    command = next((word for word in call if word.startswith("--command=")), "")
    if found := re.search(r"job\.sh (start|stop|log)|setup_vm", command):
        return found[1] or "setup"
    return call[4] if call[1] == "compute" and call[4] in ("create", "delete", "scp") else ""


@pytest.fixture
def cloud_on_path(tmp_path, monkeypatch) -> Cloud:
    """The fake gcloud as a program in PATH; a call takes a tenth of a second."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    source = (Path(__file__).parent / "fake_gcloud.py").read_text()
    (folder / "gcloud").write_text(f"#!{sys.executable} -SE\n{source}")
    (folder / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_GCLOUD", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Cloud(folder)


@pytest.fixture
def cloud(cloud_on_path, monkeypatch) -> Cloud:
    """The same in this process, for many calls."""
    import fake_gcloud
    import hosts
    import slices

    def run(argv, *, stdin, stdout, stderr, text, errors, timeout):
        followed = any(word.startswith("--command=tail") for word in argv)
        assert argv[0] == "gcloud" and (timeout > 86400 if followed else 1 <= timeout <= 3600)
        return subprocess.CompletedProcess(argv, *fake_gcloud.play(cloud_on_path.folder, argv[1:]))

    monkeypatch.setattr(hosts, "pack_repository", lambda archive: None)
    names = {
        "CompletedProcess": subprocess.CompletedProcess,
        "TimeoutExpired": subprocess.TimeoutExpired,
    }
    monkeypatch.setattr(
        slices, "subprocess", SimpleNamespace(run=run, PIPE=None, DEVNULL=None, **names)
    )
    return cloud_on_path
