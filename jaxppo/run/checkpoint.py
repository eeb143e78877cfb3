"""Save and restore train states.

    checkpoints/20/state/...        Orbax's files: every array of the state, on the host
    checkpoints/20/manifest.json    written last: checksums, shapes, score, versions

A step without a manifest is unfinished and is removed. A step that does not match its
manifest is renamed to 20.damaged with a warning, and the step before it is used.
"""

import contextlib
import math
import shutil
import sys
import threading
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from jaxppo.errors import RunError, UserError, first_line
from jaxppo.parallel import processes, sharding
from jaxppo.run import manifest
from jaxppo.run.files import make_folder
from jaxppo.run.manifest import Damaged
from jaxppo.types import PyTree, TrainState

KEEP_NEWEST = 2  # the newest, and one to fall back to
MAX_FAILURES = 3  # failed saves in a row that end the run
UNFIT = "does not fit this configuration"
HEADROOM = 1.2  # free disk space that a save needs, in sizes of the state


class Checkpoints:
    """The `checkpoints/` folder of one run. Its steps hold all but `frozen`, which
    never changes.

    Args:
      folder: created if missing.
      about: JSON values for every manifest (hash of the settings, versions).
      keep_every: keep multiples of this step for good; 0 keeps none.
      write: whether this process writes the run. A reader changes nothing on disk.
    """

    def __init__(
        self, folder: Path, *, about: dict | None = None, keep_every: int = 0, write: bool = True
    ):
        self.folder, self.about = folder.absolute(), about or {}
        self.keep_every, self.write = keep_every, write
        self.thread: threading.Thread | None = None
        self.size = 0  # bytes of the newest step on disk
        self.failures = 0  # failed saves in a row
        self.error = ""  # the last failure, until it is reported
        self.newest: int | None = None  # the last step saved by this process
        self.scores: dict[int, float | None] = {}
        if write:
            make_folder(self.folder)
            self._remove_unfinished()
        for step in self.steps():
            try:
                self.scores[step] = manifest.read(self.folder / str(step)).get("score")
            except Damaged:  # reported when it is restored
                self.scores[step] = None

    def steps(self) -> list[int]:
        """The finished steps, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(
            int(path.name)
            for path in found
            if path.name.isdigit() and (path / manifest.NAME).exists()
        )

    def is_empty(self) -> bool:
        """Whether the folder holds nothing, not even a damaged checkpoint."""
        return not self.folder.is_dir() or not any(self.folder.iterdir())

    def best_step(self) -> int | None:
        """The step with the highest score, the later of equals; None if no step has
        one.
        """
        scored = [
            (score, step) for step in self.steps() if (score := self.scores.get(step)) is not None
        ]
        return max(scored)[1] if scored else None

    def save(self, state: TrainState, *, score: float | None) -> None:
        """Write the state in the background.

        The state is copied to the host first, so its buffers may be donated at once.
        `pop_error` reports failures. All processes call this, and one writes.

        Args:
          score: ranks the checkpoints, higher is better; None for an unranked one.
        """
        live = processes.to_host(state.replace(frozen=None))
        if not self.write:
            return
        self.wait()
        if self.failures >= MAX_FAILURES:
            return  # the run is about to end: keep the error that ends it
        arrays = to_numpy(live)
        score = None if score is None or not math.isfinite(score) else float(score)
        self.thread = threading.Thread(
            target=self._save, args=(int(state.step), arrays, score), name="checkpoint"
        )
        self.thread.start()

    def _save(self, step: int, arrays: PyTree, score: float | None) -> None:
        folder = self.folder / str(step)
        try:
            need = HEADROOM * max(self.size, sum(x.nbytes for x in jax.tree.leaves(arrays)))
            free = shutil.disk_usage(self.folder).free
            if free < need:
                raise OSError(f"{need / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
            self._check_not_moved()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with checkpointer() as writer:
                writer.save(folder / "state", args=ocp.args.StandardSave(arrays))
            self._check_not_moved()
            about = {**self.about, "step": step, "score": score, "leaves": describe_leaves(arrays)}
            record = manifest.seal(folder, about)
            self.size = sum(file["bytes"] for file in record["files"].values())
            self.scores[step], self.failures, self.newest = score, 0, step
            self._prune()
        except Exception as error:  # of any kind: the main thread reports it
            self.failures += 1
            reason = first_line(error)
            self.error = f"the checkpoint of step {step} could not be written ({reason})"
            shutil.rmtree(folder, ignore_errors=True)  # or a full disk stays full

    def _check_not_moved(self) -> None:
        """Raise OSError if the folder was moved away: Orbax would silently create a new
        one.
        """
        if self.newest is None or (self.folder / str(self.newest) / manifest.NAME).exists():
            return
        raise OSError(f"that of step {self.newest} is gone")

    def _prune(self) -> None:
        """Remove all but the newest, the best and every n-th step."""
        steps = self.steps()
        keep = {*steps[-KEEP_NEWEST:], self.best_step()}
        keep |= {step for step in steps if self.keep_every and step % self.keep_every == 0}
        for step in set(steps) - keep:
            folder = self.folder / str(step)
            # the manifest first: a half-removed step must not look finished
            (folder / manifest.NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        for path in self.folder.iterdir():
            number, _, rest = path.name.partition(".")
            finished = not rest and (path / manifest.NAME).exists()
            if number.isdigit() and rest != "damaged" and not finished:
                shutil.rmtree(path, ignore_errors=True)

    def pop_error(self) -> str:
        """What went wrong with a save since the last call, or "". Raises RunError after
        three failures in a row.
        """
        error, self.error = self.error, ""
        if error and self.failures >= MAX_FAILURES:
            newest = f"step {self.steps()[-1]} is safe" if self.steps() else "no step is safe"
            raise RunError(
                f"{error}, {self.failures} times in a row now; {newest}; free space in "
                f"{self.folder}, then --resume"
            )
        return error

    def read_manifest(self, step: int | None = None) -> dict:
        """The manifest of a step (default: the newest); {} if there is none to read."""
        with contextlib.suppress(Damaged, IndexError):
            return manifest.read(self.folder / str(self.steps()[-1] if step is None else step))
        return {}

    def set_score(self, step: int, score: float | None) -> None:
        """Give a step the score that it was saved without."""
        self.scores[step] = score if score is not None and math.isfinite(score) else None
        manifest.update(self.folder / str(step), score=self.scores[step])

    def restore(self, like: TrainState, *, step: int | None = None) -> TrainState:
        """Restore the newest undamaged step, or `step`, with the `frozen` of `like`.

        Each damaged step is reported on stderr. Of several processes, process 0 chooses
        the step.

        Raises:
          UserError: no step is undamaged and has the tree, shapes and dtypes of `like`.
        """
        self.wait()
        steps = self.steps()
        if not steps:
            raise UserError(
                f"no checkpoint in {self.folder}; start the run without --resume, under "
                "another name"
            )
        if not processes.is_main():
            try:
                return self._read(processes.broadcast_int(0), like)
            except Damaged as error:
                raise UserError(
                    f"process {jax.process_index()} cannot read what process 0 reads: {error}"
                ) from None
        problem = ""
        for candidate in steps[::-1] if step is None else [step]:
            try:
                found = self._read(candidate, like)
            except Damaged as error:
                problem = f"the checkpoint of step {candidate} {error}"
                self._set_aside(candidate, problem)
            else:
                processes.broadcast_int(candidate)
                return found
        raise UserError(
            f"{problem}; no checkpoint of {self.folder} can be used, start the run again under "
            "another name"
        )

    def _read(self, step: int, like: TrainState) -> TrainState:
        """The state of a step. Raises Damaged."""
        found = read_sealed(self.folder / str(step), like.replace(frozen=None))
        return cast(TrainState, found).replace(frozen=like.frozen)

    def _set_aside(self, step: int, problem: str) -> None:
        print(f"warning: {problem}", file=sys.stderr)
        if self.write and UNFIT not in problem:
            shutil.rmtree(self.folder / f"{step}.damaged", ignore_errors=True)
            (self.folder / str(step)).rename(self.folder / f"{step}.damaged")

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def close(self) -> None:
        """Wait, and print an error that was not reported yet."""
        self.wait()
        if self.error:
            print(f"warning: {self.error}", file=sys.stderr)


def checkpointer() -> ocp.Checkpointer:
    """An Orbax checkpointer for this process alone, without barriers."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def to_numpy(tree: PyTree) -> PyTree:
    """NumPy copies of the arrays; a typed key becomes its integers."""
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), tree)


def numpy_shapes(tree: PyTree) -> PyTree:
    """Empty arrays with the shapes and dtypes of `to_numpy`."""
    data = lambda x: jax.eval_shape(jax.random.key_data, x) if is_key(x) else x
    return jax.tree.map(lambda x: np.empty(data(x).shape, data(x).dtype), tree)


def from_numpy(arrays: PyTree, like: PyTree) -> PyTree:
    """The inverse of `to_numpy`, with the key types and meshes of `like`."""

    def one(x, like):
        if is_key(like):
            x = jax.random.wrap_key_data(jnp.array(x), impl=jax.random.key_impl(like))
        if isinstance(like, jax.Array) and sharding.mesh_of(like) is not None:
            return sharding.put(x, cast(NamedSharding, like.sharding))
        return x if is_key(like) else jnp.array(x)

    return jax.tree.map(one, arrays, like)


def describe_leaves(tree: PyTree) -> dict[str, str]:
    """The dtype and shape of every leaf, by its name."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype}{list(x.shape)}"
        for path, x in found
    }


def first_difference(there: dict[str, str], here: dict[str, str]) -> str:
    """The first leaf in which two trees differ, in words, or "". Parameters come before
    their moments.
    """
    for name in {**here, **there}:
        one, other = there.get(name, "missing"), here.get(name, "missing")
        if one != other:
            return f"{name} is {one} there and {other} here"
    return ""


def save_tree(folder: Path, tree: PyTree) -> None:
    """Save a tree that stays the same through a run, such as a reward model, with a
    manifest.
    """
    temporary = folder.absolute().with_name(folder.name + ".tmp")
    for old in (temporary, folder.absolute()):
        shutil.rmtree(old, ignore_errors=True)
    make_folder(temporary)
    arrays = to_numpy(tree)
    with checkpointer() as writer:
        writer.save(temporary / "state", args=ocp.args.StandardSave(arrays))
    manifest.seal(temporary, {"leaves": describe_leaves(arrays)})
    temporary.rename(folder)


def read_sealed(folder: Path, like: PyTree) -> PyTree:
    """Read arrays of a sealed folder with the shapes and dtypes of `like`. Raises
    Damaged if that is not possible.
    """
    try:
        record = manifest.verify(folder)
    except Damaged as error:
        raise Damaged(f"is damaged: {error}") from None
    shapes = numpy_shapes(like)
    if difference := first_difference(record["leaves"], describe_leaves(shapes)):
        raise Damaged(f"{UNFIT}: {difference}")
    try:
        with checkpointer() as reader:
            arrays = reader.restore(folder / "state", args=ocp.args.StandardRestore(shapes))
    except Exception as error:  # whatever Orbax raises
        raise Damaged(f"cannot be read ({first_line(error)})") from None
    return from_numpy(arrays, like)


def load_tree(folder: Path, like: PyTree) -> PyTree:
    """Load a tree of `save_tree` with the shapes and dtypes of `like`. Raises UserError
    if it is missing, damaged or different.
    """
    if not folder.exists():
        raise UserError(
            f"{folder} is missing; the run did not get as far as its first step, start it under "
            "another name"
        )
    try:
        return read_sealed(folder.absolute(), like)
    except Damaged as error:
        advice = "" if UNFIT in str(error) else "; remove it, and it is made again"
        raise UserError(f"{folder} {error}{advice}") from None
