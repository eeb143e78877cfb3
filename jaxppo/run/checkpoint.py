"""Whole train states on disk. Orbax writes in the background, a manifest seals, and
only what is sealed and whole is read.

    checkpoints/20/state/...        Orbax's files: every array of the state, as one device holds it
    checkpoints/20/manifest.json    written last: sums of the files, names, shapes and dtypes, score, versions

A step without a manifest was never finished, and is removed; one that no longer fits
its manifest is set aside as 20.damaged, with a line that says why, and the one before
it is taken.
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

from jaxppo.errors import RunError, UserError
from jaxppo.parallel import processes, sharding
from jaxppo.run import manifest
from jaxppo.run.manifest import Damaged
from jaxppo.types import PyTree, TrainState

NEWEST = 2  # kept: the newest, and one to fall back to
MOST_FAILURES = 3  # saves in a row
HEADROOM = 1.2  # times the state's bytes that must be free


class Checkpoints:
    """The `checkpoints/` folder of one run. What never changes (`frozen`) is not in a
    step; see `save_once`.

    Args:
        folder: made when it is missing. about: JSON values for every manifest (hash of
        the configuration, versions). keep_every: steps that are multiples of it are
        kept for good; 0 = none. write: whether this process is the run's writer; a
        reader changes nothing in the folder.
    """

    def __init__(
        self, folder: Path, *, about: dict | None = None, keep_every: int = 0, write: bool = True
    ):
        self.folder, self.about, self.keep_every, self.write = (
            folder.absolute(),
            about or {},
            keep_every,
            write,
        )
        self.thread: threading.Thread | None = None
        self.size = 0  # bytes of the newest, on the disk
        self.failures, self.failed = (
            0,
            "",
        )  # saves in a row; what the last one said, until it is told
        self.newest: int | None = None  # the last step that was sealed here
        self.scores: dict[int, float | None] = {}
        if write:
            make_folder(self.folder)
            self._clean()
        for step in self.steps():
            try:
                self.scores[step] = manifest.read(self.folder / str(step)).get("score")
            except Damaged:  # found and told when it is restored
                self.scores[step] = None

    def steps(self) -> list[int]:
        """The sealed ones, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(
            int(path.name)
            for path in found
            if path.name.isdigit() and (path / manifest.NAME).exists()
        )

    def empty(self) -> bool:
        """Whether there is nothing at all, not even a damaged checkpoint."""
        return not self.folder.is_dir() or not any(self.folder.iterdir())

    @property
    def scored(self) -> bool:
        """Whether any of them has a score."""
        return any(self.scores.get(step) is not None for step in self.steps())

    def chosen(self) -> int | None:
        """The best step; None, for the newest, where none has a score."""
        return self.best() if self.scored else None

    def best(self) -> int:
        """The step with the highest score. Raises UserError when none has one."""
        scored = {
            step: score for step in self.steps() if (score := self.scores.get(step)) is not None
        }
        if not scored:
            raise UserError(f"no checkpoint of {self.folder} has a score; take the newest")
        return max(scored, key=lambda step: (scored[step], step))

    def save(self, state: TrainState, *, score: float | None) -> None:
        """Write the state in the background; `score` (higher is better) decides which
        one is the best, None = not this one.

        The state is copied to the host before this returns, so that its buffers may be
        given away. What goes wrong is told by `news`. Of several processes all call it,
        and one writes.
        """
        live = processes.to_host(state.replace(frozen=None))
        if not self.write:
            return
        self.wait()
        if self.failures >= MOST_FAILURES:
            # the run ends with these, and a fourth's message would take the place of
            # theirs
            return
        arrays = to_host(live)
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
            self._check_newest()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with checkpointer() as writer:
                writer.save(folder / "state", args=ocp.args.StandardSave(arrays))
            self._check_newest()
            record = manifest.seal(
                folder, {**self.about, "step": step, "score": score, "leaves": leaves_of(arrays)}
            )
            self.size = sum(file["bytes"] for file in record["files"].values())
            self.scores[step], self.failures, self.newest = score, 0, step
            self._prune()
        # of any kind: told at the next step, in the main thread
        except Exception as error:
            self.failures += 1
            self.failed = f"the checkpoint of step {step} could not be written ({processes.first_line(error)})"
            shutil.rmtree(folder, ignore_errors=True)  # a full disk would stay full

    def manifest_of(self, step: int | None) -> dict:
        """What a step's manifest says, or that of the newest; nothing without one that
        can be read.
        """
        with contextlib.suppress(Damaged, IndexError):
            return manifest.read(self.folder / str(self.steps()[-1] if step is None else step))
        return {}

    def rescore(self, step: int, score: float | None) -> None:
        """Give a sealed checkpoint the score that it was saved without."""
        self.scores[step] = score if score is not None and math.isfinite(score) else None
        manifest.amend(self.folder / str(step), score=self.scores[step])

    def _check_newest(self) -> None:
        """Raise OSError when the folder was moved away: Orbax would make it anew, and
        nobody would know.
        """
        if (
            self.newest is not None
            and not (self.folder / str(self.newest) / manifest.NAME).exists()
        ):
            raise OSError(f"that of step {self.newest} is gone")

    def news(self) -> str:
        """What went wrong with a save since the last call, or nothing. Raises RunError
        after three failures in a row.
        """
        told, self.failed = self.failed, ""
        if told and self.failures >= MOST_FAILURES:
            newest = f"step {self.steps()[-1]} is safe" if self.steps() else "no step is safe"
            raise RunError(
                f"{told}, {self.failures} times in a row now; {newest}; free space in {self.folder}, then --resume"
            )
        return told

    def _prune(self) -> None:
        """Remove all but the newest, the best, and every n-th."""
        steps = self.steps()
        scored = {step: score for step in steps if (score := self.scores.get(step)) is not None}
        keep = {*steps[-NEWEST:], *sorted(scored, key=lambda step: (scored[step], step))[-1:]}
        keep |= {step for step in steps if self.keep_every and step % self.keep_every == 0}
        for step in set(steps) - keep:
            self._remove(self.folder / str(step))

    def _remove(self, folder: Path) -> None:
        (folder / manifest.NAME).unlink(
            missing_ok=True
        )  # first: what is half removed is not sealed
        shutil.rmtree(folder, ignore_errors=True)

    def _clean(self) -> None:
        """Remove what killed runs left half written."""
        for path in self.folder.iterdir():
            number, _, rest = path.name.partition(".")
            sealed = not rest and (path / manifest.NAME).exists()
            if number.isdigit() and rest != "damaged" and not sealed:
                shutil.rmtree(path, ignore_errors=True)

    def restore(self, like: TrainState, *, step: int | None = None) -> TrainState:
        """The state of the newest step that is whole, with `like`'s `frozen`; or of
        `step` alone.

        Each one passed over is named on stderr with what is wrong with it. In several
        processes the first one chooses.

        Raises:
            UserError: there is none, or none that is whole and has `like`'s tree,
            shapes and dtypes.
        """
        self.wait()
        steps = self.steps()
        if not steps:
            raise UserError(
                f"no checkpoint in {self.folder}; start the run without --resume, under another name"
            )
        wanted, problem = [step] if step is not None else steps[::-1], ""
        if processes.is_main():
            for candidate in wanted:
                try:
                    found = self._read(candidate, like)
                    processes.from_main(candidate)
                    return found
                except Damaged as error:
                    problem = f"the checkpoint of step {candidate} {error}"
                    self._set_aside(candidate, problem)
            raise UserError(
                f"{problem}; no checkpoint of {self.folder} can be used, start the run again under another name"
            )
        try:
            return self._read(processes.from_main(0), like)
        except Damaged as error:
            raise UserError(
                f"process {jax.process_index()} cannot read what process 0 reads: {error}"
            ) from None

    def _read(self, step: int, like: TrainState) -> TrainState:
        """The state of a step. Raises Damaged."""
        folder = self.folder / str(step)
        try:
            record = manifest.verify(folder)
        except Damaged as error:
            raise Damaged(f"is damaged: {error}") from None
        target = like.replace(frozen=None)
        difference = differs(record["leaves"], leaves_of(host_shapes(target)))
        if difference:
            raise Damaged(f"does not fit this configuration: {difference}")
        try:
            with checkpointer() as reader:
                arrays = reader.restore(
                    folder / "state", args=ocp.args.StandardRestore(host_shapes(target))
                )
        except Exception as error:  # whatever Orbax raises
            raise Damaged(f"cannot be read ({processes.first_line(error)})") from None
        return cast(TrainState, from_host(arrays, target)).replace(frozen=like.frozen)

    def _set_aside(self, step: int, problem: str) -> None:
        print(f"warning: {problem}", file=sys.stderr)
        if self.write and "does not fit" not in problem:
            shutil.rmtree(self.folder / f"{step}.damaged", ignore_errors=True)
            (self.folder / str(step)).rename(self.folder / f"{step}.damaged")

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def close(self) -> None:
        """Wait, and tell of a failure that nobody has heard of."""
        self.wait()
        if self.failed:
            print(f"warning: {self.failed}", file=sys.stderr)


def checkpointer() -> ocp.Checkpointer:
    """Orbax for this process alone, whichever of several it is."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def to_host(tree: PyTree) -> PyTree:
    """NumPy copies of the arrays; a typed key becomes its words."""
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), tree)


def host_shapes(tree: PyTree) -> PyTree:
    """What `to_host` would give, as empty arrays."""
    data = lambda x: jax.eval_shape(jax.random.key_data, x) if is_key(x) else x
    return jax.tree.map(lambda x: np.empty(data(x).shape, data(x).dtype), tree)


def from_host(arrays: PyTree, like: PyTree) -> PyTree:
    """`to_host` undone, with the key types of `like`; what lies on a mesh there does
    here.
    """

    def one(x, like):
        x = (
            jax.random.wrap_key_data(jnp.array(x), impl=jax.random.key_impl(like))
            if is_key(like)
            else x
        )
        if isinstance(like, jax.Array) and sharding.mesh_of(like) is not None:
            return sharding.put(x, cast(NamedSharding, like.sharding))
        return x if is_key(like) else jnp.array(x)

    return jax.tree.map(one, arrays, like)


def leaves_of(tree: PyTree) -> dict[str, str]:
    """Every leaf's name, dtype and shape."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype}{list(x.shape)}"
        for path, x in found
    }


def differs(there: dict[str, str], here: dict[str, str]) -> str:
    """The first leaf that two trees do not share, in words, or nothing; the parameters
    before their moments.
    """
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            return (
                f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
            )
    return ""


def make_folder(folder: Path) -> None:
    """Raises UserError when it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); choose another --runs folder"
        ) from error


def save_once(folder: Path, tree: PyTree) -> None:
    """Write one tree that stays the same through a run (a reward model, say), sealed
    like a step.
    """
    temporary = folder.absolute().with_name(folder.name + ".tmp")
    for old in (temporary, folder.absolute()):
        shutil.rmtree(old, ignore_errors=True)
    make_folder(temporary)
    with checkpointer() as writer:
        writer.save(temporary / "state", args=ocp.args.StandardSave(to_host(tree)))
    manifest.seal(temporary, {"leaves": leaves_of(to_host(tree))})
    temporary.rename(folder)


def load_once(folder: Path, like: PyTree) -> PyTree:
    """The tree that `save_once` wrote, with the shapes and dtypes of `like`. Raises
    UserError when it is missing or damaged.
    """
    if not folder.exists():
        raise UserError(
            f"{folder} is missing; the run did not get as far as its first step, start it under another name"
        )
    target = host_shapes(like)
    try:
        difference = differs(manifest.verify(folder.absolute())["leaves"], leaves_of(target))
    except Damaged as error:
        raise UserError(f"{folder} is damaged: {error}; remove it, and it is made again") from None
    if difference:
        raise UserError(f"{folder} does not fit this configuration: {difference}")
    with checkpointer() as reader:
        arrays = reader.restore(folder.absolute() / "state", args=ocp.args.StandardRestore(target))
    return from_host(arrays, like)
