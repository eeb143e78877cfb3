"""A job that does not fit is refused before anything costs, unless forced."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOB = ["--", "experiments/sentiment.py", "--runs", "gs://my-bucket/runs"]
BABYSIT = ["--type", "v6e-16", *JOB]


@pytest.fixture
def planner(cloud, monkeypatch):
    """A fake `jaxppo` first in PATH; job_settings.py is not called."""

    def answer(code: int, out: str = "", err: str = "") -> None:
        (cloud.folder / "jaxppo").write_text(
            f'#!/bin/sh\necho "$@" >>{cloud.folder}/planned\necho '
            f"'{out}'\necho '{err}' >&2\nexit {code}\n"
        )
        (cloud.folder / "jaxppo").chmod(0o755)

    import planning

    monkeypatch.setattr(planning, "settings_problem", lambda argv, script: "")
    cloud.play(["active", "exit 0"], hosts=4)
    return answer


def test_a_job_that_fits_is_run(cloud, planner, capsys):
    planner(0, "FITS: 3.1 GiB of 31.2 GiB")
    assert cloud.run("babysit", *BABYSIT) == 0
    assert "FITS: 3.1 GiB" in capsys.readouterr().out and "start" in cloud.story
    assert (
        cloud.folder / "planned"
    ).read_text() == f"plan {cloud.cache}/config.json --topology v6e:4x4\n"


@pytest.mark.parametrize("verb", ["babysit", "run"])
def test_a_job_that_does_not_fit_is_refused_before_anything_is_created(
    cloud, planner, capsys, verb
):
    planner(2, "DOES NOT FIT: 40 GiB of 31.2 GiB")
    assert cloud.run(verb, *BABYSIT) == 2
    said = capsys.readouterr()
    assert (
        "DOES NOT FIT: 40 GiB" in said.out
        and "error: the job does not fit v6e-16 (v6e:4x4): change what" in said.err
    )
    assert [call[1] for call in cloud.calls] == ["storage"]


def test_force_starts_a_job_that_does_not_fit(cloud, planner, capsys):
    planner(2, "DOES NOT FIT: 40 GiB of 31.2 GiB")
    assert cloud.run("babysit", "--force", *BABYSIT) == 0
    assert (
        "warning: the job does not fit v6e-16" in capsys.readouterr().err and "start" in cloud.story
    )


def test_no_plan(cloud, planner):
    planner(2, "DOES NOT FIT")
    assert cloud.run("babysit", "--no-plan", *BABYSIT) == 0
    assert not (cloud.folder / "planned").exists()


@pytest.mark.parametrize(
    ("err", "complaint"),
    [
        (
            "error: it needs the TPU compiler: pip install jaxppo[tpu-plan]",
            "(pip install -e '.[tpu-plan]' in the repository, or",
        ),
        (
            "error: --model mine: choose one of smollm2",
            "jaxppo plan failed: --model mine: choose one of smollm2; fix it, or",
        ),
    ],
)
def test_a_failed_plan_is_an_error(cloud, planner, capsys, err, complaint):
    planner(2, "", err)
    assert cloud.run("babysit", *BABYSIT) == 2
    assert complaint in capsys.readouterr().err and cloud.story == []


def test_without_jaxppo(cloud, capsys, monkeypatch):
    import planning

    monkeypatch.setattr(planning.sys, "executable", "/nowhere/python")
    monkeypatch.setattr(planning, "ROOT", Path("/nowhere"))
    assert cloud.run("babysit", *BABYSIT) == 2
    assert (
        "jaxppo is not installed here, so it is unknown whether the job fits"
        in capsys.readouterr().err
        and cloud.story == []
    )


def test_jaxppo_is_found_where_the_readme_installs_it(tmp_path, monkeypatch, capsys):
    """In the .venv of the repository, which is not activated."""
    import accelerators
    import planning
    from jobs import Job

    monkeypatch.setattr(planning.sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(planning, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    command = tmp_path / ".venv" / "bin" / "jaxppo"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    job = Job("experiments/sentiment.py", (), "my-run", "runs")
    planning.check_fit(job, accelerators.ACCELERATORS["v6e-8"], "my-run", force=False, dry_run=True)
    assert f"{command} plan " in capsys.readouterr().out


def test_python_of_an_installed_command(tmp_path):
    from planning import python_of

    command = tmp_path / "jaxppo"
    command.write_text(f"#!{sys.executable}\n")
    assert python_of(str(command)) == sys.executable
    for other in ("#!/bin/sh\n", "#!/nowhere/python3\n", "\x7fELF", ""):
        command.write_text(other)
        assert python_of(str(command)) == sys.executable
    assert python_of(None) == sys.executable


def settings_of(tmp_path, script: str, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
    """The real job_settings.py, in its own process, as tpu.py calls it."""
    out = tmp_path / "config.json"
    argv = [sys.executable, str(ROOT / "tpu" / "job_settings.py"), str(out), script, *options]
    done = subprocess.run(
        argv, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    return done, json.loads(out.read_text()) if out.exists() else {}


def test_the_settings_are_the_script_s_own_with_file_and_options(tmp_path):
    """The script's defaults (bfloat16), overridden by algorithm, file and options, in order."""
    file = tmp_path / "settings.yaml"
    file.write_text("batch_size: 128\nlr: 1e-4\nreward: vader\nalgorithm: grpo\n")
    options = [
        "--config",
        str(file),
        "--lr",
        "0.5",
        "--runs",
        "gs://my-bucket/runs",
        "--distributed",
        "on",
    ]
    done, found = settings_of(tmp_path, "experiments/sentiment.py", *options)
    assert done.returncode == 0, done.stderr
    assert "its step generates nothing" not in done.stdout
    chosen = {
        name: found[name]
        for name in (
            "dtype",
            "prompt_length",
            "batch_size",
            "lr",
            "reward",
            "algorithm",
            "advantage",
            "runs",
        )
    }
    assert chosen == {
        "dtype": "bfloat16",
        "prompt_length": 9,
        "batch_size": 128,
        "lr": 0.5,
        "reward": "vader",
        "algorithm": "grpo",
        "advantage": "group",
        "runs": "gs://my-bucket/runs",
    }


def test_a_supervised_script_gives_a_note_about_the_plan(tmp_path):
    from job_settings import is_supervised

    scripts = ("pretrain", "sft", "reward_model", "sentiment", "translation")
    sources = [(ROOT / "experiments" / f"{name}.py").read_text() for name in scripts]
    assert [is_supervised(source) for source in sources] == [True, True, True, False, False]
    done, _ = settings_of(tmp_path, "experiments/reward_model.py")
    assert (done.returncode, "its step generates nothing" in done.stdout) == (0, True)


def test_options_that_the_script_would_not_take(cloud_on_path, capsys):
    """The real job_settings.py, called by tpu.py."""
    cloud_on_path.play(["active"])
    assert (
        cloud_on_path.run("babysit", "--force", "--type", "v6e-16", *JOB, "--batchsize", "3") == 2
    )
    said = capsys.readouterr().err
    assert (
        said.startswith("error: experiments/sentiment.py would not start: ")
        and "--batch-size" in said
    )
    assert cloud_on_path.story == []


def test_a_script_without_settings_of_a_run(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "print('imported')\nif __name__ == '__main__':\n    raise SystemExit('run')\n"
    )
    done, found = settings_of(tmp_path, str(script))
    assert (done.returncode, found) == (3, {})
    assert "defines no dataclass of settings that extends RunConfig" in done.stderr


PLANNED = ["--", "experiments/sentiment.py", "--config", "tests/tpu/job.yaml", "--batch-size"]


@pytest.mark.ci
def test_a_job_that_does_not_fit_is_refused_for_real(cloud_on_path, capsys):
    """The real `jaxppo plan`, with a settings file. A v5e has 16 GB."""
    pytest.importorskip("libtpu")
    cloud_on_path.play(["active"], there=True, type="v5litepod-4")
    assert cloud_on_path.run("run", "--type", "v5litepod-4", *PLANNED, "65536") == 2
    said = capsys.readouterr()
    assert "DOES NOT FIT: " in said.out and "the job does not fit v5litepod-4 (v5e:2x2)" in said.err
    assert cloud_on_path.story == []


@pytest.mark.slow
def test_a_job_that_fits_is_run_for_real(cloud_on_path, capsys):
    pytest.importorskip("libtpu")
    cloud_on_path.play(["active"], there=True, type="v5litepod-4")
    assert cloud_on_path.run("run", "--type", "v5litepod-4", *PLANNED, "64") == 0
    assert "FITS: " in capsys.readouterr().out and cloud_on_path.story == ["start"]
