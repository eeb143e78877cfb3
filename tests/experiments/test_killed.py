"""Every script that trains is killed wherever it changes its files, and resumed.

The undisturbed run is copied before each change of a file in its folder: that is what kill -9
leaves. A file that is being written is empty in the copy. Each chosen copy is resumed with the same
command, and must end with the same result.
"""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY, TIMING_KEYS, load_script, run_script, run_train, two_prompts

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig
from jaxppo.run import files

pytestmark = pytest.mark.ci
SMALL = ["--tiny", "--steps", "4", "--eval-every", "2", "--save-every", "2"]
TASK = [*SMALL[:2], "2", "--eval-every", "1", "--save-every", "1"]
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
WRITES = ("w", "a", "x", "+")
MOST = int(os.environ.get("JAXPPO_KILLS", "4"))  # of one run


class Copies:
    """Copies of a folder, one before each change in it."""

    def __init__(self, folder: Path, to: Path):
        self.folder, self.to = folder, to
        self.found: dict[tuple, tuple[str, Path]] = {}
        self.busy = self.on = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if not self.on or self.busy or event not in EVENTS:
            return
        if not isinstance(args[0], str | bytes | os.PathLike):
            return  # an open file
        path = Path(os.fsdecode(args[0])).absolute()
        if self.folder not in path.parents:
            return
        if event == "open" and not (isinstance(args[1], str) and {*args[1]} & {*WRITES}):
            return
        self.busy = True
        # another thread moves files meanwhile: no such moment
        with contextlib.suppress(FileNotFoundError, shutil.Error):
            self.copy(f"{event} {path.relative_to(self.folder)}", path, args[1:2])
        self.busy = False

    def copy(self, label: str, path: Path, mode: tuple) -> None:
        torn = label.startswith("open") and "a" not in str(mode[0])
        names = sorted(str(x.relative_to(self.folder)) for x in self.folder.rglob("*"))
        key = (*names, f"torn {path}" if torn else "")
        if key in self.found:
            return
        place = self.to / str(len(self.found))
        shutil.rmtree(place, ignore_errors=True)  # what failed
        shutil.copytree(self.folder, place, copy_function=copied)
        if torn:
            file = place / path.relative_to(self.folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
        self.found[key] = (label, place)


def copied(source: str, target: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # another thread has removed it
        shutil.copyfile(source, target)


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(folder: Path) -> list[str]:
    rows = [{"text": f"the film number {i} was good", "label": i % 2} for i in range(200)]
    return ["--data", written(folder / "texts.jsonl", rows)]


def pairs(folder: Path) -> list[str]:
    rows = [{"prompt": f"film {i}", "response": " is good"} for i in range(60)]
    return ["--data", written(folder / "pairs.jsonl", rows)]


def preferences(folder: Path) -> list[str]:
    rows = [{"prompt": f"film {i}", "better": "is good", "worse": "is bad"} for i in range(200)]
    return ["--data", written(folder / "preferences.jsonl", rows)]


def examples(folder: Path) -> list[str]:
    rows = [
        {"prompt": f"nummer {i}", "reference": f"number {i}", "aspect": "idea"} for i in range(300)
    ]
    return ["--data", written(folder / "examples.jsonl", rows)]


def nothing(folder: Path) -> list[str]:
    return []


NETWORK = ["--width", "32", "--layers", "1", "--max-vocab", "300", "--batch-size", "8"]
TURNS = ["--reward-steps", "2", "--reward-pairs", "100"]
RUNS = {
    "sentiment": (nothing, SMALL),
    "sft": (pairs, [*SMALL, "--batch-size", "8"]),
    "pretrain": (texts, [*SMALL[1:], *NETWORK, "--response-length", "15"]),
    "reward_model": (preferences, [*SMALL, "--response-length", "30", "--batch-size", "8"]),
    "reward_model --dpo": (preferences, [*SMALL, "--response-length", "30", "--batch-size", "8"]),
    "classify": (texts, SMALL),
    "translation": (examples, TASK),
    "summarisation": (examples, TASK),
    "question_answering": (examples, TASK),
    "sentiment_label": (examples, TASK),
    "reasoning": (examples, TASK),
    "entities": (nothing, TASK),
    "speech": (nothing, TASK),
    "episodes": (nothing, TASK),
    "multitask": (nothing, [*TASK, "--tasks", "spelling", "sums"]),
    "dialogue": (examples, [*TASK, *TURNS]),
    "distil": (examples, [*TASK, "--arms", "supervised", "jsd"]),
    "adversarial": (texts, ["--tiny", "--steps", "4", "--save-every", "1"]),
    "train": (nothing, [*SMALL, "--batch-size", "4", "--response-length", "4"]),
}
SWEEP = ["--tasks", "token", "--sweep", "lr=1e-3,3e-3", "--seeds", "1", "--at-once", "1"]
RUNS |= {
    "ablations/gamma": (nothing, ["--tiny", "--results", "runs/results"]),
    "ablations/epochs": (nothing, ["--scale", "smollm2", "--tiny", "--results", "runs/results"]),
    "sweep": (nothing, ["--tiny", "--no-alone", "--results", "runs/results", *SWEEP]),
    "tune": (nothing, ["--tiny", "--candidates", "2", "--keep", "2", "--out", "runs/tuned.yaml"]),
}
RUNS["train --teacher self --distil jsd"] = RUNS["train"]
RUNS["train --reference-every 2 --ema-decay 0.5"] = RUNS["train"]
QUICK = ("train",)


def without_times(x):
    """A result without minutes, and without the option that resumes."""
    if isinstance(x, dict):
        dropped = ("minutes", "resume", *TIMING_KEYS)
        return {name: without_times(y) for name, y in x.items() if name not in dropped}
    return x


def results(folder: Path) -> dict:
    """What a run has found: its results, outputs and metrics, by file."""
    names = ("result.json", "outputs.jsonl", "metrics.jsonl")
    tuned = [path.read_text() for path in folder.glob("tuned.yaml")]
    return {"tuned": tuned} | {
        str(path.relative_to(folder)): [
            without_times(row)
            for row in (
                [json.loads(path.read_text())] if path.suffix == ".json" else files.read_jsonl(path)
            )
        ]
        for path in folder.rglob("*.json*")
        if path.name in names or path.parent.name == "results"
    }


@pytest.mark.parametrize(
    "name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in RUNS]
)
def test_killed_anywhere_and_resumed(name, tmp_path, monkeypatch, capsys):
    data, options = RUNS[name]
    script, *more = name.split()
    folder, kept = tmp_path / "runs", tmp_path / "kept"
    folder.mkdir()
    command = [*more, *options, *data(tmp_path), "--runs", str(folder), "--name", "a"]
    resume, call = ["--resume"], lambda *args: run_script(script, *args)
    if script == "train":
        command += ["--data", str(two_prompts(tmp_path))]
        call = run_train
    monkeypatch.chdir(tmp_path)
    for place in ("experiments", "experiments/ablations"):
        monkeypatch.syspath_prepend(REPOSITORY / place)
    if script == "tune":
        command = options
    if script.startswith("ablations/"):
        command = options
        call = lambda *args: cli.script(load_script(script).main, AblationConfig, args=[*args])
    copies = Copies(folder, kept)
    copies.on = True
    try:
        call(*command)
    finally:
        copies.on = False
    expected = results(folder)
    assert expected
    moments = list(copies.found.values())
    chosen = sorted({round(i * (len(moments) - 1) / (MOST - 1)) for i in range(MOST)})
    wrong = {}
    for label, place in [moments[i] for i in chosen]:
        shutil.rmtree(folder)
        shutil.copytree(place, folder)
        try:
            call(*command, *resume)
        except SystemExit as stop:
            said = capsys.readouterr().err.splitlines()
            wrong |= {label: said[-1]} if stop.code else {}
        found = results(folder)
        changed = [file for file in {**expected, **found} if found.get(file) != expected.get(file)]
        wrong |= {label: f"other {', '.join(changed)}"} if changed and label not in wrong else {}
    assert not wrong, f"{len(wrong)} of {len(chosen)} moments: {wrong}"
