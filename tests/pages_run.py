"""Run the Python blocks of a page, one after another, with a tiny model."""

import runpy
from pathlib import Path

import follow_readme

from jaxppo import train

# Of every run; a page's own settings are for a checkpoint.
TINY = {
    "tiny": True, "steps": 2, "batch_size": 8, "minibatches": 1, "response_length": 4,
    "parallel": "jit", "layout": "dense",
}  # fmt: skip


def python_blocks(text: str) -> list[str]:
    """The Python blocks of a page that are no files."""
    return [x.text for x in follow_readme.fenced_blocks(text) if x[:2] == ("python", "")]


def run_page(text: str, folder: Path, monkeypatch) -> dict:
    """Run the blocks in a folder with the files that the page shows; return their names."""
    for name, content in follow_readme.shown_files(text).items():
        (folder / name).write_text(content)
    monkeypatch.chdir(folder)
    policy = train.policy

    def small(*args, **own):
        settings = {**own, **TINY}
        if "environment" in own:  # it says how long responses are
            del settings["response_length"]
        return policy(*args, **settings)

    monkeypatch.setattr(train, "policy", small)
    script = folder / "page.py"
    script.write_text("\n".join(python_blocks(text)))
    return runpy.run_path(str(script))
