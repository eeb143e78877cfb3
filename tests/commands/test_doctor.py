"""What `jaxppo doctor` says about various machines."""

import dataclasses
import os
import tomllib
import types
from pathlib import Path

import jax
import pytest

from jaxppo.commands import doctor
from jaxppo.commands.doctor import DoctorOptions, Finding


def todo(findings) -> list[str]:
    return [found.todo for found in findings if found.todo]


def texts(findings) -> dict[str, str]:
    return {found.name: found.text for found in findings}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXPPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "ROOM", 0)
    return tmp_path / "cache"


def test_this_machine_is_fine(cache, tmp_path, capsys):
    doctor.doctor(DoctorOptions(tmp_path / "runs"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all is well"
    assert not any(line.startswith("!") for line in lines)
    names = [line[2:20].strip() for line in lines[:-1]]
    want = [
        "jaxppo",
        "python",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
        "devices",
        "cache",
        "runs",
    ]
    assert names[:11] == want
    assert (
        f"{len(jax.devices())} x cpu" in lines[8]
        and str(cache) in lines[9]
        and "GB free" in lines[10]
    )
    assert not (tmp_path / "runs").exists()  # nothing is made but the cache


def test_the_last_line_says_what_to_do_and_the_exit_code_is_2(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        doctor,
        "devices",
        lambda: iter([Finding("devices", "none", "mend it"), Finding("more", "x", "and this")]),
    )
    with pytest.raises(SystemExit) as stop:
        doctor.doctor(DoctorOptions(tmp_path))
    assert stop.value.code == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "to do: mend it; and this"
    assert "! devices           none" in lines


def test_libraries_that_are_missing_or_too_old(monkeypatch):
    known = doctor.version
    monkeypatch.setattr(
        doctor, "version", lambda name: {"optax": None, "flax": "0.1"}.get(name, known(name))
    )
    found = list(doctor.versions())
    assert todo(found) == ['pip install "flax>=0.12"', 'pip install "optax>=0.2.8"']
    assert (
        texts(found)["flax"] == "0.1, but >=0.12 is needed" and texts(found)["optax"] == "missing"
    )


def test_the_git_state(monkeypatch):
    assert doctor.git().startswith(("git ", "not a git checkout"))
    monkeypatch.setattr(doctor.files, "versions", lambda: {"git": ""})
    assert doctor.git() == "not a git checkout: runs record the version alone"


def test_devices_of_every_kind(monkeypatch):
    gpu = types.SimpleNamespace(
        platform="gpu", device_kind="H100", memory_stats=lambda: {"bytes_limit": 60e9}
    )
    mute = types.SimpleNamespace(platform="tpu", device_kind="v5e", memory_stats=lambda: None)
    monkeypatch.setattr(jax, "devices", lambda: [gpu, gpu])
    assert texts(doctor.devices()) == {"devices": "2 x H100 (60.0 GB for JAX)"}
    monkeypatch.setattr(jax, "devices", lambda: [mute])
    assert texts(doctor.devices()) == {"devices": "1 x v5e"}

    def fail():
        raise RuntimeError("no driver\nmore lines")

    monkeypatch.setattr(jax, "devices", fail)
    (found,) = doctor.devices()
    assert found.text == "none: no driver" and "JAX_PLATFORMS=cpu" in found.todo


def test_an_accelerator_that_jax_does_not_use(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(
        doctor,
        "ACCELERATORS",
        {str(tmp_path / "nvidia0"): "cuda13", str(tmp_path / "accel0"): "tpu"},
    )
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert todo(doctor.devices()) == ['pip install -e ".[cuda13]"']
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # on purpose
    assert todo(doctor.devices()) == []


def test_the_cache(cache, monkeypatch):
    (cache / "xla").mkdir(parents=True)
    (cache / "xla" / "program").write_bytes(bytes(5 * 10**6))
    (cache / "gone").symlink_to(cache / "nowhere")
    (cache / "xla").chmod(0o700)
    (found,) = doctor.cache()
    assert found.text.startswith(f"{cache}, 0.01 GB, ") and not found.todo  # 0.005 and a link
    (cache / "xla").chmod(0o770)
    assert todo(doctor.cache()) == [f"chmod 700 {cache / 'xla'}"]
    monkeypatch.setenv("JAXPPO_CACHE", str(cache / "xla" / "program"))  # a file
    assert "set JAXPPO_CACHE to another" in todo(doctor.cache())[0]


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def touch(self):
        raise PermissionError(13, "Permission denied")

    assert todo(doctor.folder_of_runs(tmp_path / "a" / "b")) == [] or doctor.ROOM
    assert list(tmp_path.iterdir()) == []  # the trial leaves nothing
    monkeypatch.setattr(Path, "touch", touch)
    (found,) = doctor.folder_of_runs(tmp_path / "a" / "b")
    assert (
        "cannot be written to (Permission denied)" in found.text
        and found.todo == "choose another folder with --runs"
    )


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1.9e9))
    (found,) = doctor.folder_of_runs(tmp_path)
    assert "1.9 GB free, less than 2 GB" in found.text and found.todo.startswith(
        f"free space on the disk of {tmp_path}"
    )


def test_every_extra_of_pyproject_is_described(monkeypatch):
    path = Path(doctor.__file__).parents[2] / "pyproject.toml"
    names = list(tomllib.loads(path.read_text())["project"]["optional-dependencies"])
    assert set(doctor.ADDS) == set(names)
    assert [found.name for found in doctor.extras()] == [f"extra {name}" for name in names]
    assert todo(doctor.extras()) == []  # none of them is needed
    known = doctor.version
    monkeypatch.setattr(
        doctor, "version", lambda name: None if name in ("tensorboardX", "gguf") else known(name)
    )
    found = texts(doctor.extras())
    assert "missing tensorboardX" in found["extra track"] and found["extra track"].endswith(
        ': pip install -e ".[track]"'
    )
    assert (
        "missing gguf" in found["extra demo"] and "missing gguf" in found["extra test"]
    )  # test has demo in it


def test_another_version_is_not_called_missing(monkeypatch):
    monkeypatch.setattr(
        doctor, "declared", lambda package: ['x==2; extra == "more"', 'y>=1; extra == "more"']
    )
    monkeypatch.setattr(doctor, "version", lambda name: "1.5")
    assert texts(doctor.extras()) == {
        "extra more": 'more; missing x==2 (1.5 is installed): pip install -e ".[more]"'
    }


def test_requirements_of_extras_are_opened(monkeypatch):
    lines = {
        "jaxppo": [
            "a>=1",
            'b[x]; extra == "one"',
            'c>2; extra == "two"',
            'jaxppo[two]; extra == "one"',
            'w; sys_platform == "win32"',
        ],
        "b": ["d", 'e>=5; extra == "x"', 'f; extra == "y"'],
    }
    monkeypatch.setattr(doctor, "declared", lambda name: lines[name])
    assert [str(x) for x in doctor.requirements("jaxppo")] == ["a>=1"]
    assert [x.name for x in doctor.requirements("jaxppo", "one")] == ["e", "b", "c"]
    assert [x.name for x in doctor.requirements("jaxppo", "two")] == ["c"]


def test_the_installed_metadata_count(monkeypatch):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda name: ["jax>=0.10", 'x; extra == "more"']
    )
    assert texts(doctor.extras()) == {"extra more": 'more; missing x: pip install -e ".[more]"'}

    def missing(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", missing)
    assert texts(doctor.extras()) == {"extras": "unknown: jaxppo is not installed here"}


def test_findings_are_lines():
    assert all("\n" not in x for found in doctor.extras() for x in dataclasses.astuple(found))
    assert os.linesep not in doctor.git()
