"""setup_vm.sh in a clean folder, with its own HOME; uv, sudo and apt are stand-ins."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# uv makes a folder that looks like an environment; sudo runs what it is given, unless there is
# none.
NOTE = '#!/bin/bash\necho "$(basename "$0") $*" >>"$HOME/calls"\n'
UV = NOTE + 'case $1 in venv) mkdir -p "${@: -1}/bin" ;; pip) exit "${UV_CODE:-0}" ;; esac\n'
SUDO = NOTE + '[ -z "${NO_SUDO:-}" ] || exit 1\n[ "$1" = -n ] && shift\nexec "$@"\n'
ID = '#!/bin/bash\necho "${USER_ID:-1000}"\n'


class Machine:
    def __init__(self, folder: Path):
        self.home, self.repository, self.bin = (
            folder / "home",
            folder / "repository",
            folder / "bin",
        )
        self.pages = folder / "pages"
        self.pages.write_text("always [madvise] never\n")
        for place in (self.home, self.repository / "tpu", self.bin):
            place.mkdir(parents=True)
        for name in ("pyproject.toml", "tpu/setup_vm.sh", "tpu/requirements.txt"):
            shutil.copy(ROOT / name, self.repository / name)
        for name, text in {"uv": UV, "sudo": SUDO, "id": ID, "curl": NOTE, "apt-get": NOTE}.items():
            self.program(name, text)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def setup(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        own = {
            "HOME": str(self.home),
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "JAXPPO_PAGES": str(self.pages),
        }
        argv = ["bash", "repository/tpu/setup_vm.sh", *args]
        return subprocess.run(
            argv, cwd=self.home.parent, env=own | env, capture_output=True, text=True, timeout=20
        )

    @property
    def calls(self) -> list[str]:
        path = self.home / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


INSTALLED = [
    "uv venv --quiet --clear --python 3.12 .venv",
    "uv pip install --quiet --python .venv/bin/python -r tpu/requirements.txt",
    "uv pip install --quiet --python .venv/bin/python --no-deps -e .",
]


def test_python_pinned_packages_and_large_pages(machine):
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert machine.calls == INSTALLED
    assert machine.pages.read_text() == "always\n"
    assert done.stdout.endswith(f"set up: {machine.repository}/.venv\n")


def test_a_second_call_does_nothing_unless_a_pin_changed(machine):
    machine.setup()
    machine.pages.write_text("[always] madvise never\n")
    before = sorted(machine.home.parent.rglob("*"))
    done = machine.setup()
    assert done.returncode == 0 and done.stdout == f"set up already: {machine.repository}/.venv\n"
    assert machine.calls == INSTALLED and sorted(machine.home.parent.rglob("*")) == before
    with (machine.repository / "tpu" / "requirements.txt").open("a") as pins:
        pins.write("more==1\n")
    assert machine.setup().returncode == 0 and machine.calls == INSTALLED * 2


def test_a_failed_installation_is_repeated(machine):
    assert machine.setup(UV_CODE="1").returncode == 1
    assert machine.setup().returncode == 0 and machine.calls[-3:] == INSTALLED


def test_a_dry_run_changes_nothing(machine):
    before = sorted(machine.home.parent.rglob("*"))
    done = machine.setup("--dry-run", JAXPPO_GCSFUSE="1")
    assert done.returncode == 0 and done.stdout.endswith("dry run: nothing was changed\n")
    assert [
        line.removeprefix("+ ") for line in done.stdout.splitlines() if line.startswith("+ uv")
    ] == INSTALLED
    assert sorted({*machine.home.parent.rglob("*")} - {machine.home / "calls"}) == before
    assert (
        set(machine.calls) <= {"sudo -n true"}
        and machine.pages.read_text() == "always [madvise] never\n"
    )


def test_the_newest_versions_instead_of_the_pins(machine):
    machine.setup(JAXPPO_PINS="", JAXPPO_EXTRAS="tpu", JAXPPO_PYTHON="3.13")
    assert machine.calls == [
        "uv venv --quiet --clear --python 3.13 .venv",
        "uv pip install --quiet --python .venv/bin/python -e .[tpu]",
    ]


def test_gcsfuse_is_installed_with_patience(machine):
    """sudo is a stand-in, so nothing writes to /usr and /etc."""
    machine.program("tee", NOTE + "cat >/dev/null\n")
    done = machine.setup(JAXPPO_GCSFUSE="1")
    assert done.returncode == 0, done.stderr
    called = [call for call in machine.calls if not call.startswith(("sudo", "uv"))]
    key = "/usr/share/keyrings/cloud.google.asc"
    assert called == [
        f"tee {machine.pages}",
        f"curl -fsSL -o {key} https://packages.cloud.google.com/apt/doc/apt-key.gpg",
        "tee /etc/apt/sources.list.d/gcsfuse.list",
        "apt-get -o=DPkg::Lock::Timeout=600 -q update",
        "apt-get -o=DPkg::Lock::Timeout=600 -qy install gcsfuse",
    ]
    machine.program("gcsfuse", NOTE)
    before = machine.calls
    machine.setup(JAXPPO_GCSFUSE="1")
    assert not [call for call in machine.calls[len(before) :] if "apt-get" in call]


def test_without_sudo_the_rest_is_done(machine):
    machine.pages.unlink()
    machine.pages.symlink_to(
        "/proc/version"
    )  # cannot be written, even by root, as /sys in a container
    done = machine.setup(JAXPPO_GCSFUSE="1", NO_SUDO="1")
    assert (
        done.returncode == 1
        and "error: gcsfuse could not be installed, and runs on gs:// need it" in done.stderr
    )
    assert "pages cannot be written; left as it is" in done.stdout
    assert [call for call in machine.calls if call.startswith("uv")] == INSTALLED
    assert (
        machine.setup(JAXPPO_GCSFUSE="1", NO_SUDO="1").returncode == 1
    )  # though the rest is there already
    assert machine.setup(NO_SUDO="1").returncode == 0


def test_uv_is_installed_where_there_is_none(machine):
    uv = (machine.bin / "uv").read_text()
    (machine.bin / "uv").unlink()
    given = machine.home / "uv"
    given.write_text(uv)
    given.chmod(0o755)
    machine.program(
        "python3",
        NOTE
        + f'[ -n "${{NO_PIP:-}}" ] || cp {given} "$HOME/.local/bin/uv"\n[ -z "${{NO_PIP:-}}" ]\n',
    )
    assert machine.setup().returncode == 0
    version = re.search("uv_version=(\\S+)", (ROOT / "tpu/setup_vm.sh").read_text())
    assert version and machine.calls == [
        f"python3 -m pip install --quiet --user uv=={version[1]}",
        *INSTALLED,
    ]
    (machine.home / ".local/bin/uv").unlink()
    shutil.rmtree(machine.repository / ".venv")
    done = machine.setup(NO_PIP="1")
    assert done.returncode == 1 and "error: uv cannot be installed" in done.stderr
    assert machine.calls[-1] == f"python3 -m venv {machine.home}/.local/uv"


def test_a_wrong_option(machine):
    done = machine.setup("--fast")
    assert (
        done.returncode == 2 and done.stderr == "error: setup_vm.sh [--dry-run], but got --fast\n"
    )


def test_the_pins_are_names_and_versions_of_all_that_jaxppo_needs():
    """JAX has the version of one of the pinned test environments."""
    lines = [
        line
        for line in (ROOT / "tpu/requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[a-z0-9.]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    text = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(
        r'^    "([A-Za-z0-9-]+)', text.split("dependencies = [")[1].split("]")[0], re.MULTILINE
    )
    assert needed and set(needed) <= pins.keys() and "libtpu" in pins
    assert pins["libtpu"] in text  # the compiler that plans is the one that runs
    assert any(
        f"\njax=={pins['jax']}\n" in path.read_text()
        for path in (ROOT / "requirements").glob("*.txt")
    )


@pytest.mark.slow
def test_real_installation(tmp_path):
    """With the real uv and the pinned packages; `jaxppo doctor` confirms them."""
    found = subprocess.run(
        ["bash", "-c", "command -v python3.12 && python3.12 -c 'import sys; print(sys.prefix)'"],
        capture_output=True,
        text=True,
    )
    if found.returncode:
        pytest.skip("there is no Python 3.12")
    prefix = found.stdout.splitlines()[-1]
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "jaxppo")], check=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "pages").write_text("always [madvise] never\n")
    own = {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{prefix}/bin:/usr/bin:/bin",
        "JAXPPO_PAGES": str(tmp_path / "pages"),
    }
    env = os.environ | own  # where packages come from, and whom to trust, is the machine's
    argv = ["bash", "jaxppo/tpu/setup_vm.sh"]
    done = [
        subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
        for _ in range(2)
    ]
    assert [x.returncode for x in done] == [0, 0], done[0].stderr
    assert "set up: " in done[0].stdout and "set up already: " in done[1].stdout
    check = [str(tmp_path / "jaxppo" / ".venv" / "bin" / "jaxppo"), "doctor"]
    said = subprocess.run(
        check, env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120
    )
    assert (
        said.returncode == 0
        and "all is well" in said.stdout
        and "JAX on Cloud TPUs; installed" in said.stdout
    )
