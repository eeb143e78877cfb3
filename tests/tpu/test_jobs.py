"""A job is checked before anything costs, and only tracked files leave this machine."""

import doctest
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import accelerators
import babysitting
import basics
import gcloud_errors
import hosts
import jobs
import pytest

from jaxppo import config
from jaxppo.run import settings

V6E_8, V6E_16 = accelerators.ACCELERATORS["v6e-8"], accelerators.ACCELERATORS["v6e-16"]
SCRIPT = "experiments/sentiment.py"


def job(*options: str, kind: accelerators.Accelerator = V6E_8) -> jobs.Job:
    return jobs.parse_job([SCRIPT, *options], "my-run", kind)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A repository with a script and settings files; `left.yaml` and `data.jsonl` are untracked."""
    for name, text in {
        SCRIPT: "",
        "settings.yaml": "# mine\nname: from-file # its name\nlr: 0.1\nruns: 'gs://from-file/runs'\n",
        "config.json": '{"name": "stored", "runs": "gs://stored/runs", "lr": 0.1}',
        "broken.json": "[1]",
        "left.yaml": "lr: 1",
        "data.jsonl": "",
        "data/train.jsonl": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    tracked = [SCRIPT, "settings.yaml", "config.json", "broken.json", "data/train.jsonl"]
    monkeypatch.setattr(jobs, "tracked_files", lambda: tracked)
    return tmp_path


@pytest.mark.parametrize(
    "module",
    [accelerators, babysitting, basics, gcloud_errors, hosts, jobs],
    ids=lambda module: module.__name__,
)
def test_the_examples_in_the_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("runs", [[], ["--runs", "runs"], ["--runs", "/mnt/disk"]])
def test_several_hosts_need_a_bucket(runs):
    with pytest.raises(
        basics.Stop,
        match="v6e-16 has 4 hosts, each with its own disk: give the job --runs gs://BUCKET/FOLDER",
    ):
        job(*runs, kind=V6E_16)
    assert job(*runs).bucket == ""  # one host does not
    assert job("--runs", "gs://my-bucket/runs", kind=V6E_16).bucket == "my-bucket"


@pytest.mark.parametrize(
    "runs",
    [
        "gs:/my-bucket",
        "gs://",
        "gs://A/b",
        "gs://my-bucket/a b",
        "gs://my-bucket//a",
        "gs://my-bucket/$(x)",
    ],
)
def test_a_bucket_s_name(runs):
    with pytest.raises(basics.Stop, match="write gs://BUCKET/FOLDER"):
        job("--runs", runs)


def test_the_bucket_is_looked_for_before_anything_is_paid_for(cloud, capsys):
    cloud.play(["active"], storage=["ERROR: gs://my-bucket not found: 404."])
    assert (
        cloud.run(
            "babysit",
            "--type",
            "v6e-16",
            "--no-plan",
            "--",
            SCRIPT,
            "--runs",
            "gs://my-bucket/runs",
        )
        == 2
    )
    said = capsys.readouterr().err
    assert (
        "not found: 404.; if it does not exist: gcloud storage buckets create gs://my-bucket"
        in said
    )
    assert cloud.calls == [
        [
            "gcloud",
            "storage",
            "buckets",
            "describe",
            "gs://my-bucket",
            "--format=value(name)",
            "--quiet",
        ]
    ]


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", "x" * 65])
def test_a_run_s_name(name):
    if name:
        with pytest.raises(basics.Stop, match="use 1 to 64 letters"):
            job("--name", name)


@pytest.mark.parametrize("script", ["experiments/missing.py", "/etc/passwd", "../x.py"])
def test_a_script_of_the_repository(script):
    with pytest.raises(basics.Stop, match="is not a tracked file of"):
        jobs.parse_job([script], "my-run", V6E_8)


def test_no_job():
    with pytest.raises(basics.Stop, match="no job; give it after --"):
        jobs.parse_job([], "my-run", V6E_8)


def test_the_command_has_what_every_restart_needs():
    given = job(
        "--steps=3",
        "--runs",
        "gs://my-bucket/runs",
        "--name=mine",
        "--distributed",
        "auto",
        kind=V6E_16,
    )
    options = ["--steps=3", "--runs", "gs://my-bucket/runs", "--name=mine", "--distributed", "auto"]
    own = ["--expect-devices", "16", "--connect-timeout", "1800"]
    assert given.command(V6E_16) == ["python", SCRIPT, *options, *own]
    assert job().command(V6E_8) == [
        "python",
        SCRIPT,
        "--name",
        "my-run",
        "--runs",
        "runs",
        "--expect-devices",
        "8",
    ]


@pytest.mark.parametrize(
    ("file", "name"), [("settings.yaml", "from-file"), ("config.json", "stored")]
)
def test_name_and_runs_of_a_file_of_settings(files, file, name):
    """They are passed on the command line, where job.sh reads them, unless given there."""
    given = job("--config", file, kind=V6E_16)
    assert (given.name, given.runs) == (name, f"gs://{name}/runs")
    assert given.command(V6E_16)[2:8] == [
        "--config",
        file,
        "--name",
        name,
        "--runs",
        f"gs://{name}/runs",
    ]
    given = job(f"--config={file}", "--name", "mine", "--runs", "gs://mine/runs", kind=V6E_16)
    assert (given.name, given.runs, given.bucket) == ("mine", "gs://mine/runs", "mine")


def test_the_example_settings_are_read_as_jaxppo_reads_them(files):
    from pathlib import Path

    stored, _ = settings.read_config_file(config.RunConfig, Path(files / "settings.yaml"))
    assert {name: stored[name] for name in ("name", "runs")} == jobs.stored_names(
        "settings.yaml", ["settings.yaml"]
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            ["--config", "left.yaml"],
            "--config left.yaml: it exists here, but would not on the slice",
        ),
        (["--config", "missing.yaml"], "--config missing.yaml is not a tracked file of"),
        (["--config", "broken.json"], "--config broken.json is not a JSON object of settings"),
        (
            ["--data", "data.jsonl"],
            "--data data.jsonl: it exists here, but would not on the slice, which gets tracked",
        ),
        (["--data=data.jsonl"], "--data data.jsonl: it exists here"),
        (["--data", "/etc/hostname"], "--data /etc/hostname: it exists here"),
        (["--hf-token", "x"], "--hf-token: all users of a machine can read its command lines"),
        (["--wandb-key", "x"], "--wandb-key: all users"),
        (["--key=x"], "--key: all users"),
        (["--access-key", "x"], "--access-key: all users"),
        (["--data", "https://me:secret@host/a.jsonl"], "https://me:...@: all users"),
        (["--note", "hf_abcdefghijklmnopqrstuvwx"], "hf_...: all users"),
    ],
)
def test_untracked_files_and_secrets_are_refused(files, options, complaint):
    with pytest.raises(basics.Stop, match=complaint) as stop:
        job(*options)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--data", "data/train.jsonl"],
        ["--data", "data/"],
        ["--model", "some/model"],
        ["--lr", ".1"],
    ],
)
def test_tracked_files_and_other_words_are_accepted(files, options):
    assert job(*options).options == tuple(options)


@pytest.mark.parametrize(
    ("text", "mode", "complaint"),
    [
        (None, 0o600, "no such file"),
        ("A=1\n", 0o644, "can be read by others: chmod 600"),
        ("A=1\nexport B=2\n", 0o600, "line 2: write NAME=VALUE"),
        ("A = 1\n", 0o600, "line 1: write NAME=VALUE"),
        ("# a remark\n\nA=1\n_B2=x y=z\n", 0o600, None),
        ("\ufeffA=1\r\nB=2\r\n", 0o600, None),  # as an editor on Windows saves it
        (b"A=1\nB=\xe9\n", 0o600, r"is not UTF-8 \(byte 7\); save it as UTF-8"),
    ],
)
def test_the_file_of_secrets(tmp_path, text, mode, complaint):
    file = tmp_path / "secrets.env"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        file.chmod(mode)
    if complaint is None:
        return jobs.check_environment(file)
    with pytest.raises(basics.Stop, match=complaint):
        jobs.check_environment(file)


def test_the_launcher_needs_no_package(tmp_path):
    """-S: no site-packages, so neither jaxppo nor JAX."""
    command = [sys.executable, "-S", str(Path(jobs.__file__).with_name("tpu.py")), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


FINGERPRINT = "3072 SHA256:mine me@here (RSA)"
KEY = "~/.ssh/google_compute_engine"


@pytest.fixture
def agent(cloud, tmp_path, monkeypatch):
    """A HOME, and stand-ins for ssh-add and ssh-keygen: (exit code, text)."""

    def play(held: tuple[int, str], fingerprint: tuple[int, str], there: bool) -> None:
        for name, (code, text) in {"ssh-add": held, "ssh-keygen": fingerprint}.items():
            (cloud.folder / name).write_text(
                f"#!/bin/sh\necho $0 $* >>{tmp_path}/asked\necho '{text}'\nexit {code}\n"
            )
            (cloud.folder / name).chmod(0o755)
        (tmp_path / ".ssh").mkdir(exist_ok=True)
        if there:
            (tmp_path / ".ssh" / "google_compute_engine").touch()

    monkeypatch.setenv("HOME", str(tmp_path))
    return play


@pytest.mark.parametrize(
    ("held", "fingerprint", "there", "cure"),
    [
        (
            (0, "256 SHA256:other you@there (ED25519)"),
            (0, FINGERPRINT),
            True,
            f"type: ssh-add {KEY}",
        ),
        (
            (0, "256 SHA256:other"),
            (255, ""),
            False,
            f"type: ssh-keygen -t rsa -f {KEY} && ssh-add {KEY}",
        ),
        ((0, f"256 SHA256:other you@there (ED25519)\n{FINGERPRINT}"), (0, FINGERPRINT), True, ""),
        ((1, "The agent has no identities."), (0, FINGERPRINT), True, ""),
        ((2, "Could not open a connection to your authentication agent."), (255, ""), False, ""),
        ((0, "256 SHA256:other"), (255, ""), True, ""),  # gcloud only warns
    ],
)
def test_the_ssh_agent_of_a_pod(agent, capsys, held, fingerprint, there, cure):
    agent(held, fingerprint, there)
    if cure:
        with pytest.raises(
            basics.Stop, match=f"v6e-16 has 4 hosts, and your SSH agent lacks gcloud's key; {cure}$"
        ) as stop:
            jobs.check_agent(V6E_16)
        assert stop.value.code == 2
    else:
        jobs.check_agent(V6E_16)
    jobs.check_agent(V6E_8)  # to one host gcloud connects all the same


def test_without_the_programs_of_ssh_the_agent_is_left_to_gcloud(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    jobs.check_agent(V6E_16)


@pytest.mark.parametrize("verb", ["create", "run", "babysit"])
def test_the_ssh_agent_is_asked_before_anything_is_made(agent, cloud, tmp_path, capsys, verb):
    agent((0, "256 SHA256:other"), (0, FINGERPRINT), True)
    args = [
        "--type",
        "v6e-16",
        *(["--no-plan", "--", SCRIPT, "--runs", "gs://my-bucket/runs"] if verb != "create" else []),
    ]
    assert cloud.run(verb, "--dry-run", *args) == 0
    assert not (tmp_path / "asked").exists()
    assert cloud.run(verb, *args) == 2
    assert capsys.readouterr().err.endswith(f"type: ssh-add {KEY}\n") and cloud.calls == []


def test_only_tracked_files_are_packed(tmp_path):
    basics.pack_repository(tmp_path / "code.tar.gz")
    with tarfile.open(tmp_path / "code.tar.gz") as archive:
        names = archive.getnames()
    assert sorted(names) == sorted(
        name for name in basics.tracked_files() if os.path.lexists(basics.ROOT / name)
    )
    assert {"tpu/job.sh", "tpu/setup_vm.sh", "pyproject.toml", "experiments/sentiment.py"} <= set(
        names
    )
    assert not any(name.startswith((".git/", ".venv", "runs/")) for name in names)


def test_the_cache_folder_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert basics.private_folder("my-run").stat().st_mode & 0o077 == 0
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(basics.Stop, match="cannot write to"):
        basics.private_folder("my-run")


def test_an_old_python_gives_an_error_message(capsys, monkeypatch):
    """The syntax is that of Python 3.9, and annotations with | are not evaluated."""
    import ast

    import tpu

    for path in (basics.ROOT / "tpu").glob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 9))
        given = [
            node.annotation
            for node in ast.walk(tree)
            if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation
        ]
        given += [
            node.returns
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.returns
        ]
        unions = any(
            isinstance(node, ast.BitOr) for annotation in given for node in ast.walk(annotation)
        )
        assert (
            not unions
            or "\nfrom __future__ import annotations\n" in path.read_text()
            or path.stem == "job_settings"
        ), path
    monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
    assert tpu.main(["status"]) == 2
    assert capsys.readouterr().err == (
        "error: tpu.py needs Python 3.11 or newer, and this is 3.10.12; try python3.12 tpu/tpu.py\n"
    )


def test_the_standard_library_is_enough():
    """tpu.py needs no packages; only job_settings.py needs all of jaxppo. What jobs.py takes from
    it needs none (`test_the_launcher_needs_no_package`).
    """
    import ast

    own = {path.stem for path in (basics.ROOT / "tpu").glob("*.py")}
    for path in (basics.ROOT / "tpu").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found = {
            name.name.split(".")[0]
            for node in nodes
            if isinstance(node, ast.Import)
            for name in node.names
        }
        found |= {
            str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)
        }
        assert found - own - sys.stdlib_module_names == (
            {"jaxppo"} if path.name in ("job_settings.py", "jobs.py") else set()
        ), path
