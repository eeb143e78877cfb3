"""The commands in tpu/README.md and elsewhere.md: each call of tpu.py works as a dry run, and each
job's options are valid.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "tpu" / "README.md").read_text()
ELSEWHERE = (ROOT / "tpu" / "elsewhere.md").read_text()


def blocks(text: str, *languages: str) -> list[str]:
    return [
        block
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
        if language in languages
    ]


def commands(text: str) -> list[list[str]]:
    """The calls of tpu.py in shell blocks, or in a docstring."""
    joined = text.replace("\\\n", " ")
    return [
        shlex.split(line)[2:]
        for line in joined.splitlines()
        if line.strip().startswith("python3 tpu/tpu.py")
    ]


def test_from_nothing_to_a_finished_run_in_six_commands():
    lines = blocks(README, "sh")[0].splitlines()
    assert len(lines) == 6 and lines[-1].startswith("python3 tpu/tpu.py babysit")


def test_every_command_of_tpu_py_works_as_a_dry_run(cloud, capsys):
    """The commands of the README and of --help; `secrets.env` exists."""
    import tpu

    Path("secrets.env").touch(0o600)
    found = [command for block in blocks(README, "sh") for command in commands(block)] + commands(
        tpu.__doc__ or ""
    )
    assert {command[0] for command in found} == set(tpu.VERBS)
    for command in found:
        assert tpu.main([command[0], "--dry-run", *command[1:]]) == 0, (
            command,
            capsys.readouterr().err,
        )
    assert cloud.calls == []


def test_the_table_has_all_types():
    from accelerators import ACCELERATORS

    rows = re.findall(r"^\| v\w+ \| (.*?) \|", README, re.MULTILINE)
    assert " ".join(rows).split() == list(ACCELERATORS)


def test_how_to_clean_up_and_where_prices_are():
    assert "## Clean up" in README and "https://cloud.google.com/tpu/pricing" in README


JOBS = re.findall(
    r"job\.sh exec -- python (experiments/\S+) (.*?)(?:\"|$)",
    ELSEWHERE.replace("\\\n", " "),
    re.MULTILINE,
)


@pytest.mark.parametrize(("script", "options"), JOBS, ids=["gke", "skypilot", "slurm"])
def test_the_jobs_elsewhere_have_valid_options(tmp_path, monkeypatch, script, options):
    import job_settings

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script's folder is added
    monkeypatch.setitem(sys.modules, "job", None)  # the script is imported by this name
    assert job_settings.main(str(tmp_path / "config.json"), script, *shlex.split(options)) == 0
    found = json.loads((tmp_path / "config.json").read_text())
    assert (
        found["name"] == "my-run"
        and found["runs"] in ("/runs", "/shared/runs")
        and found["batch_size"] == 256
    )
    # A row for each minibatch on each device.
    assert found["batch_size"] % (found["expect_devices"] * found["minibatches"]) == 0


def test_three_other_places():
    assert len(JOBS) == 3 and re.findall("^## (\\w+)", ELSEWHERE, re.MULTILINE) == [
        "GKE",
        "SkyPilot",
        "SLURM",
    ]


def test_the_task_for_skypilot():
    (text,) = blocks(ELSEWHERE, "yaml")
    task = yaml.safe_load(text)
    assert set(task) == {"name", "resources", "workdir", "file_mounts", "setup", "run"}
    assert task["resources"]["job_recovery"] == {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [75],
    }
    assert task["file_mounts"]["/runs"] == {"source": "gs://my-bucket", "mode": "MOUNT"}
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_the_batch_script_for_slurm_asks_for_the_devices_that_it_expects(tmp_path):
    script = next(block for block in blocks(ELSEWHERE, "bash") if "#SBATCH" in block)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script, re.MULTILINE))
    assert (
        int(asked["nodes"]) * int(asked["ntasks-per-node"]) == 16
        and asked["gpus-per-node"] == asked["ntasks-per-node"]
    )
    # What is done with each exit code, with stand-ins for SLURM.
    for code, requeued in ((75, True), (0, False), (2, False), (76, False)):
        (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/requeued\n')
        for name in ("srun", "scontrol"):
            (tmp_path / name).chmod(0o755)
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
        (tmp_path / "requeued").unlink(missing_ok=True)
        assert subprocess.run(["bash", "-c", script], env=env).returncode == code
        assert (tmp_path / "requeued").exists() == requeued
