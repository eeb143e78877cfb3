"""Resume a run: check that it is the same one, and finish what a signal left out."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import jax

from jaxppo import pretrained
from jaxppo.config import FREE, HIDDEN, RunConfig
from jaxppo.errors import UserError
from jaxppo.parallel import processes
from jaxppo.run import files, loop
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.settings import read_config, to_dict
from jaxppo.types import TrainState

# settings that the model, the functions and the data decide
LOADED = ("eos", "pad", "start", "functions", "chats")
# what runs had before there was a setting, where a preset has another value now
BEFORE = {"likelihood_coef": 0.0}


def not_started(folder: Path, checkpoints: Checkpoints) -> bool:
    """Whether a run was killed before its first state was saved: no step is logged, and
    there is no checkpoint, not even a damaged one.
    """
    empty = bool(processes.broadcast_int(int(_is_unsaved(folder, checkpoints))))
    if empty and processes.is_main() and (folder / "config.json").exists():
        print("the run ended before anything was saved: it starts from the beginning")
    return empty


def _is_unsaved(folder: Path, checkpoints: Checkpoints) -> bool:
    path = folder / "metrics.jsonl"
    return checkpoints.is_empty() and not (path.exists() and path.stat().st_size)


def restore_newest(
    config: RunConfig, checkpoints: Checkpoints, state: TrainState, folder: Path, *, data: str = ""
) -> TrainState:
    """Restore the newest checkpoint. Raises UserError if the settings, the weights or
    the data (`data`, their `rows.identity`) have changed.

    Deletes the parameters and moments of `state`: two copies may not fit in memory.
    """
    check_settings(config, folder)
    check_weights(config, checkpoints)
    check_data(config, checkpoints.read_manifest().get("data", ""), data)
    found = checkpoints.restore(state)
    for array in jax.tree.leaves((state.params, state.opt_state)):
        array.delete()
    return found


def check_early(
    config: RunConfig, *, but: Collection[str] = (), also: Collection[str] = ()
) -> None:
    """Raise UserError if a setting differs that must not change during the run that is
    to be resumed. Call it before anything is loaded; `but` names settings that are not
    known yet, `also` more that must not change.
    """
    folder = Path(config.runs) / config.name
    if not config.resume or not (folder / "config.json").exists():
        return
    if not _is_unsaved(folder, Checkpoints(folder / "checkpoints", write=False)):
        _refuse(_changed_settings(config, folder, but={*LOADED, *but}), also)


def stored_prompt_length(config: RunConfig) -> int:
    """The prompt length of the run that is to be resumed; 0 if there is none."""
    path = Path(config.runs) / config.name / "config.json"
    if not config.resume or not path.exists():
        return 0
    return read_config(RunConfig, path).prompt_length


def check_settings(config: RunConfig, folder: Path) -> None:
    """Raise UserError if a setting differs that must not change during a run, and print
    the others that differ.
    """
    changed = _changed_settings(config, folder)
    _refuse(changed)
    if news := changed.keys() - {"resume", "runs", "name", "traceback"}:
        print(f"changed since the run began: {_shown(changed, news)}")
    if "steps" in changed and config.lr_schedule != "constant":
        print(
            f"note: the {config.lr_schedule} schedule now ends at step {config.steps}, so the "
            "learning rate jumps"
        )


def _changed_settings(
    config: RunConfig, folder: Path, *, but: Collection[str] = ()
) -> dict[str, tuple]:
    """(stored, present) values of the settings that differ."""
    read_config(RunConfig, folder / "config.json")  # raises UserError if it is damaged
    stored = BEFORE | json.loads((folder / "config.json").read_text())
    now = to_dict(config)
    return {
        name: (stored[name], now[name])
        for name in (stored.keys() & now.keys()) - {*but}
        if stored[name] != now[name] and stored[name] != HIDDEN
    }


def _refuse(changed: dict[str, tuple], also: Collection[str] = ()) -> None:
    if fixed := changed.keys() - FREE.difference(also):
        raise UserError(
            f"--resume with other settings would make it another run: {_shown(changed, fixed)}; "
            "start one under another --name"
        )


def _shown(changed: dict[str, tuple], names: Collection[str]) -> str:
    each = ((name, *changed[name]) for name in sorted(names))
    return ", ".join(f"--{name.replace('_', '-')} {old} -> {new}" for name, old, new in each)


def weight_hashes(config: RunConfig) -> dict[str, str]:
    """Hashes of the weights that a run needs and does not save: the base model, the
    reward model and the teacher. "" where a download is verified anyway, or there is
    nothing to hash.
    """

    def of_run(folder: Path) -> str:
        found = Checkpoints(folder / "checkpoints", write=False)
        return str(found.read_manifest(found.best_step()).get("sha256", ""))[:16]

    def of_model(name: str) -> str:
        return "" if name in pretrained.BUNDLED else pretrained.weights_hash(name)

    run = files.trained_run(config.teacher) if config.teacher else None
    return {
        "model": "" if config.tiny else of_model(config.model),
        "reward_model": of_run(Path(config.reward_model)) if config.reward_model else "",
        "teacher": of_model(config.teacher) if run is None else of_run(run),
    }


def check_weights(
    config: RunConfig,
    checkpoints: Checkpoints,
    names: Sequence[str] = ("model", "reward_model", "teacher"),
) -> None:
    """Raise UserError if the base, reward model or teacher has changed since the run
    began: adapters on another base are another policy.
    """
    now, stored = weight_hashes(config), checkpoints.read_manifest().get("weights", {})
    for name in names:
        if stored.get(name) and now[name] and stored[name] != now[name]:
            option = f"--{name.replace('_', '-')} {getattr(config, name)}"
            raise UserError(
                f"{option} holds other weights than when this run began: put those back, or "
                "start one under another --name"
            )


def check_data(config: RunConfig, stored: str, data: str) -> None:
    """Raise UserError if the run was trained on other data so far (`stored`, their
    hash), unless `data_changed` allows it.
    """
    if not stored or not data or stored == data:
        return
    if config.data_changed != "ok":
        raise UserError(
            "the data are not those that this run began with: put them back, continue with "
            "--data-changed ok, or start another run under another --name"
        )
    if processes.is_main():
        print("note: the data are not those that this run began with")


def finish_evaluation(
    config: RunConfig,
    checkpoints: Checkpoints,
    state: TrainState,
    folder: Path,
    evaluate: loop.Evaluate,
) -> None:
    """Run the evaluation that a signal left out, and add its metrics to the log and its
    score to the checkpoint.
    """
    step = int(state.step)
    due = step > 0 and loop.evaluation_due(config, step)
    if not processes.broadcast_int(int(due and checkpoints.scores.get(step) is None)):
        return
    found = loop.validation_metrics(evaluate, state)
    if not processes.is_main():
        return
    path = folder / "metrics.jsonl"
    rows = files.read_metrics(folder)
    files.write_jsonl(path, [row | found if row["step"] == step else row for row in rows])
    checkpoints.set_score(step, found.get("validation_score"))
