"""The notebook and its script are one text; and it runs from the first cell to the last."""

import json
import os
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
import nbformat

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SCRIPT, NOTEBOOK = EXPERIMENTS / "colab.py", EXPERIMENTS / "colab.ipynb"


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_they_are_one_text():
    """After a change: jupytext --to ipynb experiments/colab.py"""
    script, notebook = jupytext.read(SCRIPT), nbformat.read(NOTEBOOK, as_version=4)
    assert cells(notebook) == cells(script)
    for name in ("accelerator", "colab", "kernelspec"):
        assert notebook.metadata[name] == script.metadata[name]
    nbformat.validate(notebook)


def test_nothing_is_left_of_a_run():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_colabs_own_jax_is_kept():
    text = SCRIPT.read_text()
    assert '"-c", "kept.txt"' in text and 'f"{name}=={version(name)}" for name in ("jax", "jaxlib")' in text
    assert "jax[" not in text and "--upgrade" not in text and "-U" not in text


@pytest.mark.ci
def test_every_cell_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("JAXPPO_SMOKE", "1")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"colab-classifier-0", "colab-classifier-0.zip"}
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "step 2/2" in text and "judge " in text and "error:" not in text
    assert [output for output in outputs if output.output_type == "display_data" and "image/png" in output.data]
