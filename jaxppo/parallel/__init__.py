"""Compile a train step for one device, for several under pmap, or over a mesh. The step
itself is the same.

    jit    one device
    pmap   data parallelism: state replicated, rows split, sums over the axis "devices"
    mesh   jit with shardings (`sharding.py`): rows over data and fsdp,
           parameters over fsdp and tensor

Each is one XLA program with the same numbers and one interface. `place` puts a state,
and `put` a batch, where the program wants them; a call runs a step and deletes the old
state; `unreplicate` gives the state to programs outside of the step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxppo.errors import UserError
from jaxppo.parallel import processes, sharding
from jaxppo.types import Prompts, TrainState

AXIS = "devices"
MODES = ("auto", "jit", "pmap", "mesh")
Make = Callable[[str | None], Callable]  # the train step for an axis name


class CompiledStep:
    """A train step under jit on one device. The state is donated: the old one is
    deleted by a call.

    `frozen` is an operand of its own and not donated. `traces` counts how often the
    step was traced: 1 after any number of calls with the same shapes.
    """

    name = "jit on one device"

    def __init__(self, train_step: Callable):
        self.train_step, self.traces = train_step, 0
        self.program: Any = jax.jit(self.traced, donate_argnums=0)
        self.executable: Any = None  # the program, once all processes have compiled it

    def traced(self, live: TrainState, frozen, prompts: Prompts):
        """The function that is compiled."""
        self.traces += 1
        state, metrics = self.train_step(live.replace(frozen=frozen), prompts)
        return state.replace(frozen=None), metrics

    def place(self, state: TrainState) -> TrainState:
        return state

    def put(self, prompts: Prompts) -> Prompts:
        return jax.device_put(prompts)

    def unreplicate(self, state: TrainState) -> TrainState:
        return state

    def __call__(self, state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        frozen, live = state.frozen, state.replace(frozen=None)
        if self.executable is None:
            self.executable = self._compile(live, frozen, prompts)
        live, metrics = self.executable(live, frozen, prompts)
        return live.replace(frozen=frozen), metrics

    def _compile(self, *args):
        """Of several processes, none calls the program before all have compiled it: on
        CPU, a collective waits at most 30 s for devices it has not met.
        """
        if jax.process_count() == 1:
            return self.program
        program = self.program.lower(*args).compile()
        processes.wait_for_all("compiled")
        return program

    def lower(self, state: TrainState, prompts: Prompts):
        """The lowered program, for cost and memory analysis."""
        return self.program.lower(state.replace(frozen=None), state.frozen, prompts)


class PmapStep(CompiledStep):
    """A train step under `jax.pmap`. Arrays of the state have a leading dimension: one
    copy for each device of this process.
    """

    def __init__(self, train_step: Callable, *, devices: Sequence | None = None):
        super().__init__(train_step)
        # of all processes
        self.devices = list(jax.devices() if devices is None else devices)
        index = jax.process_index()
        self.own = [i for i, device in enumerate(self.devices) if device.process_index == index]
        self.name = f"pmap on {len(self.devices)} devices"
        self.program = jax.pmap(self.traced, axis_name=AXIS, donate_argnums=0, devices=self.devices)
        mesh = Mesh(np.asarray(self.devices)[self.own], (AXIS,))
        self.sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        self.frozen: Any = None  # as it was before it was placed

    def place(self, state: TrainState) -> TrainState:
        """Copy every array to each device; an array in several places is copied once.

        The unplaced `frozen` is kept for programs outside of the step;
        `memory.minimum_bytes` counts it.
        """
        self.frozen, known = state.frozen, {}

        def replicate(x):
            if id(x) not in known:
                parts = [jax.device_put(x[None], self.devices[i]) for i in self.own]
                known[id(x)] = jax.make_array_from_single_device_arrays(
                    (len(parts), *x.shape), self.sharding, parts
                )
            return known[id(x)]

        return jax.tree.map(replicate, state)

    def put(self, prompts: Prompts) -> Prompts:
        """Split the rows into equal parts, in order, so that groups and blocks of
        minibatches stay together. Each process takes the parts of its own devices.
        """
        leading = prompts.index.ndim - 1  # 1 with several steps in a dispatch

        def cut(x):
            rows = x.shape[leading] // len(self.devices)
            shape = (*x.shape[:leading], len(self.devices), rows, *x.shape[leading + 1 :])
            return np.moveaxis(np.asarray(x).reshape(shape), leading, 0)[self.own]

        return jax.device_put(jax.tree.map(cut, prompts), self.sharding)

    def unreplicate(self, state: TrainState) -> TrainState:
        """The first copy, with the unplaced `frozen`."""
        return _first_copy(state.replace(frozen=None)).replace(frozen=self.frozen)

    def _compile(self, *args):
        """Let all devices meet in a small program first. (A pmap program that is
        compiled ahead cannot be called by several processes.)
        """
        if jax.process_count() > 1:
            processes.wait_for_all("pmap")
            meet = jax.pmap(lambda x: jax.lax.psum(x, AXIS), axis_name=AXIS, devices=self.devices)
            jax.block_until_ready(meet(np.ones(len(self.own), np.float32)))
        return self.program

    def __call__(self, state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        state, metrics = super().__call__(state, prompts)
        return state, _first_copy(metrics)  # the same on all devices


def _first_copy(tree):
    return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)


class MeshStep(CompiledStep):
    """A train step under jit over a mesh; the compiler inserts the collectives."""

    def __init__(self, train_step: Callable, mesh: Mesh, *, leading: int = 0):
        super().__init__(train_step)
        self.mesh, self.rows = mesh, sharding.row_sharding(mesh, leading=leading)
        self.name = "mesh of " + ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        self.program = None  # `build` makes it

    def traced(self, live: TrainState, frozen, prompts: Prompts):
        # the model's layers need to know the mesh (`models.layout`)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return super().traced(live, frozen, prompts)

    def build(self, state: TrainState) -> TrainState:
        """Make the program for states of these shapes, and return the state unchanged.
        Shapes alone are enough.
        """
        where, self.executable = sharding.state_shardings(state, self.mesh), None
        live, frozen = where.replace(frozen=None), where.frozen
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.program = jax.jit(
            self.traced,
            donate_argnums=0,
            in_shardings=(live, frozen, self.rows),
            out_shardings=(live, everywhere),
        )
        return state

    def place(self, state: TrainState) -> TrainState:
        return sharding.place(self.build(state), self.mesh)

    def put(self, prompts: Prompts) -> Prompts:
        return jax.tree.map(lambda x: sharding.put(x, self.rows), prompts)


def compile_step(train_step: Callable) -> CompiledStep:
    """Compile `train_step` under jit for one device."""
    return CompiledStep(train_step)


def compile_for_mode(
    make: Make,
    *,
    mode: str = "auto",
    mesh: str = "",
    devices: Sequence | None = None,
    leading: int = 0,
) -> CompiledStep:
    """Compile the step of `make(axis_name)` in one of the modes.

    Args:
      mode: auto is mesh if there is a mesh, otherwise pmap on several devices,
      otherwise
        jit.
      mesh: as in `sharding.parse_mesh`.
      leading: 1 if prompts have a leading dimension of steps.

    Raises:
      UserError: an unknown mode, or a mesh that does not fit the devices.
    """
    found = list(jax.devices() if devices is None else devices)
    if mode not in MODES:
        raise UserError(f"--parallel {mode!r}: choose one of {', '.join(MODES)}")
    if uses_mesh(mode, mesh):
        return MeshStep(make(None), sharding.make_mesh(mesh, found), leading=leading)
    if mode == "pmap" or (mode == "auto" and len(found) > 1):
        return PmapStep(make(AXIS), devices=found)
    return CompiledStep(make(None))


def uses_mesh(mode: str, mesh: str) -> bool:
    """Whether a mode uses a mesh: auto does if there is one."""
    return mode == "mesh" or (mode == "auto" and mesh != "")


def row_shards(mode: str, mesh: str = "") -> int:
    """The number of devices over which a mode splits the rows."""
    if uses_mesh(mode, mesh):
        sizes = sharding.parse_mesh(mesh)
        return sizes["data"] * sizes["fsdp"]
    return 1 if mode == "jit" else len(jax.devices())
