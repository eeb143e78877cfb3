"""A run that is gone on with: whether it is still the same one, and what a signal left
undone.
"""

import json
from pathlib import Path

import jax

from jaxppo import pretrained
from jaxppo.config import FREE, HIDDEN, RunConfig
from jaxppo.errors import UserError
from jaxppo.parallel import processes
from jaxppo.pretrained import identity
from jaxppo.run import files, loop
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.settings import from_file, to_dict
from jaxppo.types import TrainState


def not_started(folder: Path, checkpoints: Checkpoints) -> bool:
    """Whether a run was killed before its first state was saved: it has no step and no
    checkpoint, whole or damaged.
    """
    path = folder / "metrics.jsonl"
    nothing = checkpoints.empty() and not (path.exists() and path.stat().st_size)
    nothing = bool(processes.from_main(int(nothing)))
    if nothing and processes.is_main():
        print("the run was ended before anything was saved: it begins")
    return nothing


def load_newest(
    config: RunConfig, checkpoints: Checkpoints, state: TrainState, folder: Path
) -> TrainState:
    """The newest checkpoint's state, if the settings are still those of the run. Raises
    UserError.

    Where it is found, the parameters and moments of `state` are given up, as a first
    step would: two of each may not fit.
    """
    from_file(RunConfig, folder / "config.json")  # it is one
    stored = json.loads((folder / "config.json").read_text())
    now = to_dict(config)
    changed = {
        name
        for name in stored.keys() & now.keys()
        if stored[name] != now[name] and stored[name] != HIDDEN
    }
    shown = lambda names: ", ".join(
        f"--{name.replace('_', '-')} {stored[name]} -> {now[name]}" for name in sorted(names)
    )
    if changed - FREE:
        raise UserError(
            f"--resume with other settings would make it another run: {shown(changed - FREE)}; start one under another --name"
        )
    if news := changed - {"resume", "runs", "name", "traceback"}:
        print(f"changed since the run began: {shown(news)}")
    check_weights(config, checkpoints)
    if "steps" in changed and config.lr_schedule != "constant":
        end = f"the {config.lr_schedule} schedule now ends at step {config.steps}"
        print(f"note: {end}, so the learning rate jumps to where that has it")
    found = checkpoints.restore(state)
    for array in jax.tree.leaves((state.params, state.opt_state)):
        array.delete()
    return found


def weight_hashes(config: RunConfig) -> dict[str, str]:
    """What a run stands on and does not keep in its checkpoints: the base (which with
    adapters is the reference, too) and the reward model, by their `identity`; "" for
    what a download's own hash or nothing on this machine vouches for.
    """
    own = "" if config.tiny or config.model in pretrained.BUNDLED else identity(config.model)
    if not config.reward_model:
        return {"model": own, "reward_model": ""}
    judge = Checkpoints(Path(config.reward_model) / "checkpoints", write=False)
    return {
        "model": own,
        "reward_model": str(judge.manifest_of(judge.chosen()).get("sha256", ""))[:16],
    }


def check_weights(config: RunConfig, checkpoints: Checkpoints) -> None:
    """Raises UserError where they are others by now: adapters on another base are
    another policy, without a word.
    """
    now, stored = weight_hashes(config), checkpoints.manifest_of(None).get("weights", {})
    for name in now:
        if stored.get(name) and now[name] and stored[name] != now[name]:
            option, value = name.replace("_", "-"), getattr(config, name)
            other = f"--{option} {value} holds other weights than when this run began"
            raise UserError(f"{other}: put those back, or start one under another --name")


def finish_evaluation(
    config: RunConfig,
    checkpoints: Checkpoints,
    state: TrainState,
    folder: Path,
    evaluate: loop.Evaluate,
) -> None:
    """The evaluation that a signal left out, of the checkpoint that it left: its line
    and its score are what they would have been.
    """
    step = int(state.step)
    due = step > 0 and loop.evaluates(config, step)
    if not processes.from_main(int(due and checkpoints.scores.get(step) is None)):
        return
    found = loop.validated(evaluate, state)
    if not processes.is_main():
        return
    rows = files.read_lines(folder / "metrics.jsonl")
    rows = [row | found if row["step"] == step else row for row in rows]
    files.write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    checkpoints.rescore(step, found.get("validation_score"))
