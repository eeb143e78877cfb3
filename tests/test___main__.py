"""`python -m jaxppo` in a process of its own: the command, and a reader that has had enough."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "jaxppo"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}


def call(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *args], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )


def test_it_is_the_command():
    done = call("algorithms")
    assert done.returncode == 0 and done.stdout.startswith("reinforce ") and done.stderr == ""
    done = call("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: jaxppo VERB")
    done = call("algorithms", "--settingz")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and len(done.stderr.splitlines()) == 1
    )


def test_the_installed_command_is_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"jaxppo": "jaxppo.__main__:main"}


@pytest.mark.parametrize("args", [["--help"], ["algorithms", "--settings"]], ids=" ".join)
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_had_enough(args, buffered):
    """`jaxppo ... | head -1`: whether it notes that at the first line, or when all is flushed, it
    says nothing of it.
    """
    read, write = os.pipe()
    os.close(read)
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(
        [*COMMAND, *args],
        env=environment,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_shown():
    """That of a worker or a server is an error as any other."""
    code = """if True:
        import sys
        from jaxppo import __main__, commands
        def main():
            print("x")
            raise BrokenPipeError("of a worker")
        commands.main = main
        __main__.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "x\n") and done.stderr.endswith(
        "BrokenPipeError: of a worker\n"
    )
