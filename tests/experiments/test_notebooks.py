"""The notebooks for Colab and Kaggle have the cells of one script. They run from the first cell to
the last, and also on a simulated Colab and Kaggle with stand-ins for git, pip, the Drive and the
training runs.
"""

import dataclasses
import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

jupytext = pytest.importorskip("jupytext")
import jax
import nbformat

from jaxppo import train
from jaxppo.config import RunConfig, validate

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SCRIPT = EXPERIMENTS / "notebook_cells.py"
NOTEBOOKS = ("colab", "kaggle")


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(EXPERIMENTS / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebooks_are_made_from_the_script(name):
    """After a change: python experiments/make_notebooks.py"""
    notebook, script = read(name), jupytext.read(SCRIPT)
    nbformat.validate(notebook)
    assert notebook == runpy.run_path(str(EXPERIMENTS / "make_notebooks.py"))["make"](
        f"{name}.ipynb"
    )
    cells = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells(notebook) == cells(script) and len(script.cells) > 10


def test_each_notebook_asks_for_a_tpu():
    colab, kaggle = (read(name).metadata for name in NOTEBOOKS)
    assert (colab.accelerator, colab.colab.gpuType) == ("TPU", "V5E1")
    assert (kaggle.kaggle.accelerator, kaggle.kaggle.isInternetEnabled) == ("tpuV5e8", True)
    assert colab.kernelspec == kaggle.kernelspec
    assert colab.kernelspec.name == "python3"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebooks_have_no_outputs(name):
    for cell in read(name).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@dataclasses.dataclass(frozen=True)
class Asked(RunConfig):
    """The options of `sentiment.py` that the notebook sets."""

    reward: str = ""
    dtype: str = "bfloat16"


@pytest.fixture
def simulated(tmp_path, monkeypatch):
    """A machine of Colab, or of Kaggle where its environment variables are set. `run(...)` runs all
    cells on devices of a kind. `asked` has the options of every main run, `own` those of every run
    with a reward of the notebook's, `calls` the commands, `kept` the versions that pip must keep.
    """
    runtime = tmp_path / "content"
    runtime.mkdir()
    there = SimpleNamespace(
        folder=runtime, calls=[], kept=[], asked=[], own=[], sampled=[], mounted=[], downloads=[]
    )

    def command(argv, **options):
        there.calls.append(argv)
        assert options == {"check": True}
        if argv[0] == "git":
            (runtime / argv[-1] / "experiments").mkdir(parents=True)
            (runtime / argv[-1] / "pyproject.toml").touch()
        else:
            there.kept.append((runtime / "kept.txt").read_text().splitlines())

    def main(options):
        there.asked.append(options)
        folder = Path(options.runs) / options.name
        assert (folder / "config.json").exists() == options.resume
        folder.mkdir(parents=True, exist_ok=True)
        row = {
            "prompt": "a",
            "before": "b",
            "sentiment_before": 0.0,
            "after": "c",
            "sentiment_after": 0.5,
        }
        (folder / "outputs.jsonl").write_text(json.dumps(row))
        (folder / "result.json").write_text(
            '{"sentiment_before": 0, "sentiment_after": 0.5, "kl": 1}'
        )
        for name in ("config.json", "metrics.jsonl", "curves.png"):
            (folder / name).write_text("{}")

    class Run:
        def __init__(self, folder):
            self.folder, self.metrics = folder, {"reward": np.ones(2), "kl": np.ones(2)}

        def export(self, folder, *, dtype):
            assert not folder.exists() and dtype == "bfloat16"
            folder.mkdir()
            (folder / "model.safetensors").write_text(str(self.folder))
            return folder

        def sample(self, prompts):
            there.sampled.append((str(self.folder), len(prompts)))
            return [" it"] * len(prompts)

    def policy(prompts, reward, **settings):
        there.own.append(RunConfig(**settings))
        assert reward("the", "a bee") == -2 > reward("the", "")  # -(1 + 3) / 2
        return Run(Path(settings["runs"]) / settings["name"])

    modules = {
        name: ModuleType(name)
        for name in ("google", "google.colab", "sentiment", "IPython", "IPython.display")
    }
    modules["google.colab"].drive = SimpleNamespace(mount=there.mounted.append)
    modules["google.colab"].files = SimpleNamespace(download=there.downloads.append)
    modules["sentiment"].Sentiment, modules["sentiment"].main = Asked, main
    modules["IPython.display"].Image, modules["IPython.display"].display = (
        Path,
        lambda image: image.read_bytes(),
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(runtime)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", command)
    monkeypatch.setattr(train, "open_run", Run)
    monkeypatch.setattr(train, "policy", policy)

    def run(backend="cpu", kind="cpu", devices=1, versions=None, **form):
        versions = versions or {"jax": "0.10.2", "jaxlib": "0.10.2"}
        monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)] * devices)
        text = SCRIPT.read_text().replace('"/content/drive', f'"{tmp_path}/drive')
        for name, value in form.items():
            (line,) = [
                x for x in text.splitlines() if x.startswith(f"{name} = ") and "# @param" in x
            ]
            text = text.replace(line, f"{name} = {value!r}")
        (tmp_path / "cells.py").write_text(text)
        runpy.run_path(str(tmp_path / "cells.py"))

    there.run = run
    return there


@pytest.fixture
def colab(simulated, monkeypatch):
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "ISTPUVM", "JAXPPO_SMOKE"):
        monkeypatch.delenv(name, raising=False)
    return simulated


@pytest.fixture
def kaggle(colab, monkeypatch):
    """A machine with a TPU. It has the package google.colab, as Kaggle's others have."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setenv("ISTPUVM", "1")
    return colab


def test_colabs_own_jax_is_kept(colab):
    """Any version of JAX is kept: pip is not asked for another one."""
    colab.run(versions={"jax": "0.11.0.dev3+cuda", "jaxlib": "0.11.1"})
    assert colab.calls == [
        ["git", "clone", "--depth", "1", "https://github.com/jaxppo/jaxppo", "jaxppo"],
        [sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", "-e", "jaxppo[demo]"],
    ]
    assert colab.kept == [["jax==0.11.0.dev3+cuda", "jaxlib==0.11.1"]]
    root = str(colab.folder / "jaxppo")
    assert sys.path[:2] == [f"{root}/experiments", root]
    colab.run(REPOSITORY="elsewhere")  # run again: the clone stays
    assert [argv[0] for argv in colab.calls] == ["git", sys.executable, sys.executable] and len(
        colab.kept
    ) == 2


def test_an_old_jax_is_refused_before_anything_is_installed(colab):
    with pytest.raises(
        SystemExit, match="JAX is 0.9.12 here, and jaxppo needs 0.10: Runtime, Change runtime type"
    ):
        colab.run(versions={"jax": "0.9.12", "jaxlib": "0.9.12"})
    assert (
        [argv[0] for argv in colab.calls] == ["git"]
        and not (colab.folder / "kept.txt").exists()
        and colab.asked == []
    )


@pytest.mark.parametrize(
    ("backend", "kind", "name", "batch_size", "dtype"),
    [
        ("gpu", "Tesla T4", "sentiment-vader-3-t4", 128, "float32"),
        ("gpu", "NVIDIA L4", "sentiment-vader-3-l4", 128, "bfloat16"),
        ("tpu", "TPU v5 lite", "sentiment-vader-3-v5e", 128, "bfloat16"),
        ("cpu", "cpu", "sentiment-vader-3-cpu", 64, "bfloat16"),
        ("gpu", "another", "sentiment-vader-3-gpu", 128, "bfloat16"),
    ],
)
def test_sizes_and_name_depend_on_the_machine(
    colab, capsys, backend, kind, name, batch_size, dtype
):
    colab.run(backend, kind, SEED=3, REWARD="vader", STEPS=4)
    (asked,) = colab.asked
    assert (asked.name, asked.batch_size, asked.dtype) == (name, batch_size, dtype)
    assert asked.parallel == "jit"
    assert (asked.runs, asked.seed, asked.reward, asked.steps, asked.eval_every) == (
        "runs",
        3,
        "vader",
        4,
        4,
    )
    assert ("There is no accelerator" in capsys.readouterr().out) == (backend == "cpu")


def test_without_drive_the_run_is_packed_and_downloaded(colab):
    colab.run()
    place = "runs/sentiment-classifier-0-cpu"
    assert colab.downloads == [f"{place}.zip"] and colab.mounted == []
    files = ["config.json", "curves.png", "metrics.jsonl", "model/model.safetensors"]
    files += ["outputs.jsonl", "result.json"]
    with zipfile.ZipFile(colab.folder / f"{place}.zip") as archive:
        assert sorted(archive.namelist()) == [
            f"sentiment-classifier-0-cpu/{name}" for name in files
        ]
        assert archive.read("sentiment-classifier-0-cpu/model/model.safetensors") == place.encode()
    assert colab.sampled == [(place, 2), ("runs/own-reward", 4)]
    colab.run(STEPS=80)  # continues the run and exports the model again
    assert [(x.steps, x.resume) for x in colab.asked] == [(50, False), (80, True)]


def test_on_drive_another_machine_starts_its_own_run(colab, tmp_path, capsys):
    """It could not resume the other machine's run, because its sizes differ."""
    runs = tmp_path / "drive" / "MyDrive" / "jaxppo"
    for backend, kind in (("gpu", "Tesla T4"), ("tpu", "TPU v5 lite"), ("gpu", "Tesla T4")):
        colab.run(backend, kind, SAVE_TO_DRIVE=True)
    assert colab.mounted == [f"{tmp_path}/drive"] * 3 and colab.downloads == []
    assert [x.resume for x in colab.asked] == [False, False, True]
    for one, other in ((0, 1), (0, 2)):
        first, second = (dataclasses.replace(colab.asked[i], resume=False) for i in (one, other))
        assert (first == second) == (first.name == second.name)
    assert {path.name for path in runs.iterdir()} == {
        "sentiment-classifier-0-t4",
        "sentiment-classifier-0-v5e",
    }
    assert (
        runs / "sentiment-classifier-0-v5e" / "model" / "model.safetensors"
    ).exists()  # without an archive
    assert f"on Drive: {runs}/sentiment-classifier-0-t4\n" in capsys.readouterr().out


def test_kaggle_splits_batches_over_its_eight_cores(kaggle, capsys):
    kaggle.run("tpu", "TPU v5 lite", devices=8)
    (asked,), (own,) = kaggle.asked, kaggle.own
    assert (asked.name, asked.runs) == ("sentiment-classifier-0-v5e", "runs")
    assert (asked.parallel, own.parallel) == ("pmap", "pmap")
    # 128 rollouts = 8 cores x 4 minibatches x 4; 64 = 8 cores x groups of 4 x 2
    assert (asked.batch_size, asked.minibatches) == (128, 4)
    assert (own.batch_size, own.minibatches, own.group_size) == (64, 1, 4)
    validate(asked, devices=8)
    validate(own, devices=8)
    assert "8 x TPU v5 lite (v5e), parallel by pmap" in capsys.readouterr().out


def test_kaggles_two_t4_share_a_batch_in_float32(kaggle):
    kaggle.run("gpu", "Tesla T4", devices=2)
    (asked,) = kaggle.asked
    assert (asked.parallel, asked.batch_size, asked.dtype) == ("pmap", 128, "float32")
    validate(asked, devices=2)


def test_kaggles_jax_is_kept_and_gets_its_libtpu(kaggle, monkeypatch):
    kaggle.run("tpu", "TPU v5 lite", devices=8)
    monkeypatch.delenv("ISTPUVM")
    kaggle.run()
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", "-e"]
    assert kaggle.calls == [
        ["git", "clone", "--depth", "1", "https://github.com/jaxppo/jaxppo", "jaxppo"],
        [*pip, "jaxppo[demo,tpu]"],
        [*pip, "jaxppo[demo]"],
    ]
    assert kaggle.kept == [["jax==0.10.2", "jaxlib==0.10.2"]] * 2


def test_kaggles_old_jax_is_refused_with_the_setting_to_change(kaggle):
    with pytest.raises(SystemExit, match="JAX is 0.7.2 here.*Always use latest environment"):
        kaggle.run(versions={"jax": "0.7.2", "jaxlib": "0.7.2"})
    assert [argv[0] for argv in kaggle.calls] == ["git"]


def test_kaggle_has_no_drive_and_the_archive_stays_there(kaggle, capsys):
    kaggle.run(SAVE_TO_DRIVE=True)
    assert kaggle.mounted == kaggle.downloads == []
    place = "runs/sentiment-classifier-0-cpu"
    assert (kaggle.folder / f"{place}.zip").exists()
    printed = capsys.readouterr().out
    assert f"written: {place}.zip" in printed and "Settings -> Accelerator -> TPU v5e-8" in printed


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "devices", "parallel"),
    [("colab", 1, "jit"), pytest.param("kaggle", 8, "pmap", marks=pytest.mark.slow)],
)
def test_every_cell_runs(name, devices, parallel, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("JAXPPO_SMOKE", "1")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(devices))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH", "")])
    )
    notebook = read(name)
    nbclient.NotebookClient(
        notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    run, own = (tmp_path / "runs" / x for x in ("sentiment-classifier-0-cpu", "own-reward"))
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        run.name,
        f"{run.name}.zip",
        own.name,
    }
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    text = "".join(
        output.text
        for output in outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    assert f"on {devices} x cpu (cpu), parallel by {parallel}" in text
    assert "step 2/2" in text and "judge " in text and "error:" not in text
    assert [
        output
        for output in outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert f"written: runs/{run.name}/model (the best checkpoint, of step 2)" in text
    assert "\nThe film is" in text or text.startswith("The film is")
    assert "step 10/10" in text and "reward of each step: [-" in text and "\nWe learn that" in text
    for folder, steps in ((run, 2), (own, 10)):
        config = json.loads((folder / "config.json").read_text())
        assert (config["parallel"], config["steps"]) == (parallel, steps)
    with zipfile.ZipFile(f"{run}.zip") as archive:
        packed = {name.removeprefix(f"{run.name}/") for name in archive.namelist()}
    assert {"result.json", "model/model.safetensors", "model/README.md"} <= packed
    assert json.loads((run / "model" / "config.json").read_text())["dtype"] == "bfloat16"
