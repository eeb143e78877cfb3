"""The notebook and its script are the same. The notebook runs from the first cell to the last, and
also on a simulated Colab with stand-ins for git, pip, the Drive and the training run.
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

import pytest

jupytext = pytest.importorskip("jupytext")
import jax
import nbformat

from jaxppo.commands import export, sample
from jaxppo.config import RunConfig

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SCRIPT, NOTEBOOK = EXPERIMENTS / "colab.py", EXPERIMENTS / "colab.ipynb"


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_script_and_notebook_have_the_same_cells():
    """After a change: jupytext --to ipynb experiments/colab.py"""
    script, notebook = jupytext.read(SCRIPT), nbformat.read(NOTEBOOK, as_version=4)
    assert cells(notebook) == cells(script)
    for name in ("accelerator", "colab", "kernelspec"):
        assert notebook.metadata[name] == script.metadata[name]
    nbformat.validate(notebook)


def test_the_notebook_has_no_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@dataclasses.dataclass(frozen=True)
class Asked(RunConfig):
    """The options of `sentiment.py` that the notebook sets."""

    reward: str = ""
    dtype: str = "its own"


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A simulated Colab. `run(...)` runs all cells on a kind of machine. `asked` has the options of
    every run, `calls` the commands, `kept` the versions that pip must keep.
    """
    runtime = tmp_path / "content"
    runtime.mkdir()
    there = SimpleNamespace(
        folder=runtime, calls=[], kept=[], asked=[], sampled=[], mounted=[], downloads=[]
    )

    def command(argv, **options):
        there.calls.append(argv)
        assert options == {"check": True}
        if argv[0] == "git":
            (runtime / argv[-1] / "experiments").mkdir(parents=True)
            (runtime / argv[-1] / "pyproject.toml").touch()
        else:
            there.kept.append((runtime / "kept.txt").read_text().splitlines())

    def train(options):
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

    def exported(options):
        assert not options.folder.exists() and options.dtype == "bfloat16"
        options.folder.mkdir()
        (options.folder / "model.safetensors").write_text(str(options.run))

    modules = {
        name: ModuleType(name)
        for name in ("google", "google.colab", "sentiment", "IPython", "IPython.display")
    }
    modules["google.colab"].drive = SimpleNamespace(mount=there.mounted.append)
    modules["google.colab"].files = SimpleNamespace(download=there.downloads.append)
    modules["sentiment"].Sentiment, modules["sentiment"].main = Asked, train
    modules["IPython.display"].Image, modules["IPython.display"].display = (
        Path,
        lambda image: image.read_bytes(),
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(runtime)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", command)
    monkeypatch.setattr(export, "export", exported)
    monkeypatch.setattr(sample, "sample", there.sampled.append)

    def run(backend="cpu", kind="cpu", versions=None, **form):
        versions = versions or {"jax": "0.10.2", "jaxlib": "0.10.2"}
        monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
        text = SCRIPT.read_text().replace('"/content/drive', f'"{tmp_path}/drive')
        for name, value in form.items():
            (line,) = [
                x for x in text.splitlines() if x.startswith(f"{name} = ") and "# @param" in x
            ]
            text = text.replace(line, f"{name} = {value!r}")
        (tmp_path / "cells.py").write_text(text)
        runpy.run_path(str(tmp_path / "cells.py"))

    there.run = run
    yield there


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
        ("gpu", "Tesla T4", "colab-vader-3-t4", 128, "float32"),
        ("gpu", "NVIDIA L4", "colab-vader-3-l4", 128, "its own"),
        ("tpu", "TPU v5 lite", "colab-vader-3-v5e", 128, "its own"),
        ("cpu", "cpu", "colab-vader-3-cpu", 64, "its own"),
        ("gpu", "another", "colab-vader-3-gpu", 128, "its own"),
    ],
)
def test_sizes_and_name_depend_on_the_machine(
    colab, capsys, backend, kind, name, batch_size, dtype
):
    colab.run(backend, kind, SEED=3, REWARD="vader", STEPS=4)
    (asked,) = colab.asked
    assert (asked.name, asked.batch_size, asked.dtype) == (name, batch_size, dtype)
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
    place = "runs/colab-classifier-0-cpu"
    assert colab.downloads == [f"{place}.zip"] and colab.mounted == []
    files = [
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "model/model.safetensors",
        "result.json",
        "outputs.jsonl",
    ]
    with zipfile.ZipFile(colab.folder / f"{place}.zip") as archive:
        assert sorted(archive.namelist()) == [f"colab-classifier-0-cpu/{name}" for name in files]
        assert archive.read("colab-classifier-0-cpu/model/model.safetensors") == place.encode()
    (sampled,) = colab.sampled
    assert str(sampled.run) == place and len(sampled.prompts) == 2
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
        "colab-classifier-0-t4",
        "colab-classifier-0-v5e",
    }
    assert (
        runs / "colab-classifier-0-v5e" / "model" / "model.safetensors"
    ).exists()  # without an archive
    assert f"on Drive: {runs}/colab-classifier-0-t4\n" in capsys.readouterr().out


@pytest.mark.ci
def test_every_cell_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("JAXPPO_SMOKE", "1")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH", "")])
    )
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    run = tmp_path / "runs" / "colab-classifier-0-cpu"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {run.name, f"{run.name}.zip"}
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    text = "".join(
        output.text
        for output in outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    assert "step 2/2" in text and "judge " in text and "error:" not in text
    assert [
        output
        for output in outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert f"written: runs/{run.name}/model (the best checkpoint, of step 2)" in text
    assert "\nThe film is" in text or text.startswith("The film is")
    with zipfile.ZipFile(f"{run}.zip") as archive:
        packed = {name.removeprefix(f"{run.name}/") for name in archive.namelist()}
    assert {"result.json", "model/model.safetensors", "model/README.md"} <= packed
    assert json.loads((run / "model" / "config.json").read_text())["dtype"] == "bfloat16"
