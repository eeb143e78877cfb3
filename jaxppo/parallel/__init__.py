"""How a train step is compiled: for one device, for several under pmap, or over a mesh.
The step itself never knows.

    jit    one device
    pmap   plain data parallelism: state replicated, rows split, gradients and statistics summed over the axis "devices"
    mesh   jit with shardings: rows over data and fsdp, parameters over fsdp and tensor (`sharding.py` has the rules)

Each is one XLA program a step, gives the same numbers, and has one interface: `place`
puts a state where the program wants it, `put` a batch of prompts; a call makes a step
and destroys the old state; `whole` shows the state to programs outside of it: pmap's
first copy, a mesh's arrays as they lie.
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
    """A train step as one XLA program on one device, with its state donated: the old
    state is gone after a call.

    `frozen` is passed beside the state and not donated, so that it stays where it is.
    `traces` counts how often the step was traced: 1 after any number of calls with the
    same shapes.
    """

    name = "jit on one device"

    def __init__(self, train_step: Callable):
        self.train_step, self.traces = train_step, 0
        self.program: Any = jax.jit(self.traced, donate_argnums=0)
        self.begun: Any = None  # the program once all processes have compiled it

    def traced(self, live: TrainState, frozen, prompts: Prompts):
        """What becomes the program: `frozen` beside the state, so that it is not
        donated with it.
        """
        self.traces += 1
        state, metrics = self.train_step(live.replace(frozen=frozen), prompts)
        return state.replace(frozen=None), metrics

    def place(self, state: TrainState) -> TrainState:
        return state

    def put(self, prompts: Prompts) -> Prompts:
        return jax.device_put(prompts)

    def whole(self, state: TrainState) -> TrainState:
        return state

    def __call__(self, state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        frozen, live = state.frozen, state.replace(frozen=None)
        if self.begun is None:
            self.begun = self.compiled(live, frozen, prompts)
        live, metrics = self.begun(live, frozen, prompts)
        return live.replace(frozen=frozen), metrics

    def compiled(self, *args):
        """What to call. Of several processes none calls it before all have compiled it:
        on CPU, collectives between devices that never met wait 30 s for each other.
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
    """The same under `jax.pmap`: every array of the state has a leading dimension, one
    copy a device of this process.
    """

    def __init__(self, train_step: Callable, *, devices: Sequence | None = None):
        super().__init__(train_step)
        # of all processes
        self.devices = list(jax.devices() if devices is None else devices)
        self.own = [
            i
            for i, device in enumerate(self.devices)
            if device.process_index == jax.process_index()
        ]
        self.name = f"pmap on {len(self.devices)} devices"
        self.program = jax.pmap(self.traced, axis_name=AXIS, donate_argnums=0, devices=self.devices)
        mesh = Mesh(np.asarray(self.devices)[self.own], (AXIS,))
        self.sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        self.frozen: Any = None  # what is never trained, as it was before it was placed

    def place(self, state: TrainState) -> TrainState:
        """A copy on each device, of an array that stands in several places one alone.
        What is frozen is kept as it was, too, for programs outside of the step;
        `memory.least` counts that, and what else `train.fit` still has, on the first
        device.
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
        """The rows in equal parts, in order: those of a group and of a block of
        minibatches stay together. Each process takes the parts of its own devices.
        """
        leading = prompts.index.ndim - 1  # 1 with several steps in a dispatch

        def cut(x):
            shape = (
                *x.shape[:leading],
                len(self.devices),
                x.shape[leading] // len(self.devices),
                *x.shape[leading + 1 :],
            )
            return np.moveaxis(np.asarray(x).reshape(shape), leading, 0)[self.own]

        return jax.device_put(jax.tree.map(cut, prompts), self.sharding)

    def whole(self, state: TrainState) -> TrainState:
        live = jax.tree.map(lambda x: x.addressable_data(0)[0], state.replace(frozen=None))
        return live.replace(frozen=self.frozen)

    def compiled(self, *args):
        """The program, when all devices have met in a small one. (What pmap compiles
        ahead, several processes cannot call.)
        """
        if jax.process_count() > 1:
            processes.wait_for_all("pmap")
            meet = jax.pmap(lambda x: jax.lax.psum(x, AXIS), axis_name=AXIS, devices=self.devices)
            jax.block_until_ready(meet(np.ones(len(self.own), np.float32)))
        return self.program

    def __call__(self, state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        state, metrics = super().__call__(state, prompts)
        return state, jax.tree.map(
            lambda x: x.addressable_data(0)[0], metrics
        )  # they are the same on all


class MeshStep(CompiledStep):
    """The same under jit over a mesh; the compiler puts the collectives in."""

    def __init__(self, train_step: Callable, mesh: Mesh, *, leading: int = 0):
        super().__init__(train_step)
        self.mesh, self.rows = mesh, sharding.row_sharding(mesh, leading=leading)
        self.name = "mesh of " + ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        self.program = None  # it wants to know the state first

    def traced(self, live: TrainState, frozen, prompts: Prompts):
        """The same, telling the model's layers of the mesh (`models.layout`)."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return super().traced(live, frozen, prompts)

    def abstract(self, state: TrainState) -> TrainState:
        """The program for states of these shapes; returns the state unchanged. (Nothing
        is computed: to lower, to plan.)
        """
        where, self.begun = sharding.state_shardings(state, self.mesh), None
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
        return sharding.place(self.abstract(state), self.mesh)

    def put(self, prompts: Prompts) -> Prompts:
        return jax.tree.map(lambda x: sharding.put(x, self.rows), prompts)


def compile_step(train_step: Callable) -> CompiledStep:
    """`train_step` under jit on one device."""
    return CompiledStep(train_step)


def prepare(
    make: Make,
    *,
    mode: str = "auto",
    mesh: str = "",
    devices: Sequence | None = None,
    leading: int = 0,
) -> CompiledStep:
    """The step of `make(axis_name)` compiled in one of the modes; auto is jit on one
    device, pmap on several, mesh with a mesh.

    `mesh` as in `sharding.parse_mesh`; `leading` is 1 where prompts have a leading
    dimension of steps. Raises UserError for an unknown mode or a mesh that does not fit
    the devices.
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
    """Whether a step is cut over a mesh: asked for, or given to a mode that is free to
    take it.
    """
    return mode == "mesh" or (mode == "auto" and mesh != "")


def row_shards(mode: str, mesh: str = "") -> int:
    """Over how many devices a mode splits the rows."""
    if uses_mesh(mode, mesh):
        sizes = sharding.parse_mesh(mesh)
        return sizes["data"] * sizes["fsdp"]
    return 1 if mode == "jit" else len(jax.devices())
