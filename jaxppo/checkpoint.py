"""Whole train states on disk, through Orbax: renamed into place when complete; the newest and the best are kept."""

from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxppo.config import UserError
from jaxppo.types import PyTree, TrainState


class Checkpoints:
    """The `checkpoints/` folder of one run. What never changes (`frozen`) is not in a step; see `save_once`."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        keep = policies.AnyPreservationPolicy(
            [policies.LatestN(1), policies.BestN(get_metric_fn=lambda metrics: metrics["score"], n=1)]
        )
        # Temporary folders of a killed run are not checkpoints; Orbax removes its own.
        options = ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler())

    def save(self, state: TrainState, *, score: float) -> None:
        """Write the state in the background; `score` (higher is better) decides which one is the best."""
        live = state.replace(frozen=None)
        # Copied first: the next step is given this state's own buffers to overwrite.
        self.manager.save(int(state.step), args=ocp.args.StandardSave(jax.tree.map(jnp.copy, live)), metrics={"score": score})

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def restore(self, like: TrainState, *, step: int | None = None) -> TrainState:
        """The state of `step` (default: the newest), with `like`'s shapes, dtypes and `frozen`.

        Raises UserError when there is none, or when it was made by another configuration.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.folder}; start the run without --resume, under another name")
        step = steps[-1] if step is None else step
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like.replace(frozen=None))
        try:
            stored = self.manager.item_metadata(step)
            difference = _difference(getattr(stored, "tree", stored), target)
            if difference:
                raise UserError(f"the checkpoint of step {step} does not fit this configuration: {difference}")
            restored = self.manager.restore(step, args=ocp.args.StandardRestore(target))
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"the checkpoint of step {step} cannot be read ({reason})") from error
        return cast(TrainState, restored).replace(frozen=like.frozen)

    def close(self) -> None:
        """Wait until everything is written."""
        self.manager.wait_until_finished()
        self.manager.close()


def _difference(stored: PyTree, target: PyTree) -> str:
    """The first leaf that two trees do not share, in words, or nothing. Orbax itself casts another dtype without a word."""

    def leaves(tree) -> dict[str, str]:
        found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype}{list(x.shape)}" for path, x in found}

    there, here = leaves(stored), leaves(target)
    for name in {**here, **there}:  # the parameters before their moments
        if there.get(name) != here.get(name):
            return f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
    return ""


def save_once(folder: Path, tree: PyTree) -> None:
    """Write one tree that stays the same through a run (a reward model, say)."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder.absolute(), tree, force=True)


def load_once(folder: Path, like: PyTree) -> PyTree:
    """The tree that `save_once` wrote, with the shapes and dtypes of `like`."""
    if not folder.exists():
        raise UserError(f"{folder} is missing; the run did not get as far as its first step, start it under another name")
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder.absolute(), jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
