"""Write colab.ipynb and kaggle.ipynb: the cells of notebook_cells.py, with metadata that ask Colab
and Kaggle for a TPU.

    python experiments/make_notebooks.py
"""

from pathlib import Path

import jupytext
import nbformat

SCRIPT = Path(__file__).with_name("notebook_cells.py")
METADATA = {
    "colab.ipynb": {"accelerator": "TPU", "colab": {"gpuType": "V5E1"}},
    "kaggle.ipynb": {
        "kaggle": {
            "accelerator": "tpuV5e8",
            "dataSources": [],
            "isGpuEnabled": False,
            "isInternetEnabled": True,
            "language": "python",
            "sourceType": "notebook",
        }
    },
}


def make(name: str) -> nbformat.NotebookNode:
    """The notebook of that file name."""
    notebook = jupytext.read(SCRIPT)
    kernel = notebook.metadata.kernelspec
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, **METADATA[name]})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same every time
    return notebook


if __name__ == "__main__":
    for name in METADATA:
        nbformat.write(make(name), SCRIPT.with_name(name))
