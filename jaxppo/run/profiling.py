"""What a run's time went to: seconds of compilation, productive share of the wall
clock, use of the chip, and a trace of steps.

The numbers stand in metrics.jsonl beside the step's own: `compile_seconds` (tracing and
compiling, only where there was any), `recompilations` (of the step, beyond its first: 0
unless something is wrong, such as a batch of another shape, or arrays that lie on the
devices otherwise than before), `goodput` (share of the time since training began in
this process that steps took: not their compilation, nor evaluations, nor what a save or
a late batch made them wait) and, on a chip whose peak is known, `mfu` (the operations
that a step has by `costs.phases`, over what the chips could have done in its seconds at
their peak in 16 bits, whatever --dtype; https://arxiv.org/abs/2204.02311, appendix B).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from jaxppo.config import RunConfig, profiled_steps
from jaxppo.costs import chips
from jaxppo.costs import phases as phases_module
from jaxppo.models.shapes import ModelConfig
from jaxppo.parallel import CompiledStep

CLOCK = (
    "seconds",
    "tokens_per_second",
    "compile_seconds",
    "goodput",
    "mfu",
)  # what differs between two runs of the same numbers

# JAX's names of events; this one comes for functions within functions, too
TRACED = "/jax/core/compile/jaxpr_trace_duration"
BACKEND = "/jax/core/compile/backend_compile_duration"
COMPILED = ("/jax/core/compile/jaxpr_to_mlir_module_duration", BACKEND)
STEPS = (
    "jit(traced)",
    "jit(_fun)",
)  # what JAX calls a `CompiledStep` there: under jit and over a mesh, and under pmap


class Trace:
    """A JAX trace of some steps in <folder>/profile, for TensorBoard's profile tab,
    XProf or Perfetto.

    Its regions are those of `ppo.py`: rollout (in it generate and reference), reward,
    advantages, update.
    """

    def __init__(self, config: RunConfig, folder: Path):
        (self.first, self.last), self.folder, self.on = (
            profiled_steps(config),
            folder / "profile",
            False,
        )

    def before(self, begins: int, ends: int) -> None:
        """To be told of each dispatch by its first and last step, when the one before
        is done; a dispatch is traced whole.
        """
        if self.on and begins > self.last:
            self.close()
        if not self.on and begins <= self.last and self.first <= ends:
            jax.profiler.start_trace(str(self.folder))
            self.on = True

    def close(self) -> None:
        """Write the trace, if one is being made."""
        if self.on:
            self.on = False
            jax.profiler.stop_trace()


class Meter:
    """Turns the seconds of dispatches into the numbers above."""

    def __init__(
        self,
        step: CompiledStep,
        *,
        flops: float = 0.0,
        peak: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.step, self.flops, self.peak, self.clock = step, flops, peak, clock
        self.began, self.productive = clock(), 0.0
        self.traces = self.untraced = (
            # at the last dispatch; dispatches that compiled the step again without
            # tracing it
            0
        )
        self.forget()
        jax.monitoring.register_event_duration_secs_listener(self.hear)

    def hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """One of JAX's events."""
        if event == TRACED:
            self.tracing = max(self.tracing, duration_secs)  # the outermost function's
        elif event in COMPILED:
            self.compiling += duration_secs
            self.heard |= event == BACKEND and kwargs.get("fun_name") in STEPS

    def forget(self) -> None:
        """What was compiled until now was not the step."""
        self.tracing, self.compiling, self.heard = 0.0, 0.0, False

    def numbers(self, seconds: float, steps: int, *, idle: float = 0.0) -> dict[str, float]:
        """Of a dispatch of so many steps that took so many seconds, compilation and the
        `idle` ones of the devices included.
        """
        compiled = self.tracing + self.compiling
        run = max(seconds - compiled, 0.0)
        self.productive += max(run - idle, 0.0)
        # The same shapes laid out otherwise: JAX compiles what it has traced already.
        self.untraced += self.heard and self.step.traces == self.traces
        self.traces = self.step.traces
        found = {
            "goodput": self.productive / max(self.clock() - self.began, 1e-9),
            "recompilations": float(max(self.traces - 1, 0) + self.untraced),
        }
        if compiled:
            found["compile_seconds"] = compiled
        elif self.peak and self.flops:
            found["mfu"] = self.flops * steps / (run * self.peak) if run else 0.0
        return found

    def close(self) -> None:
        """Hear no more."""
        jax.monitoring.unregister_event_duration_listener(self.hear)


def flops_of(config: RunConfig, shape: ModelConfig, *, supervised: bool) -> float:
    """Operations of one step, over all devices (`costs.phases`); 0 for networks other
    than transformers.
    """
    if shape.kind != "transformer":
        return 0.0
    config = (
        replace(config, value_loss="none") if supervised else config
    )  # nothing asks there for a critic of its own
    phases = phases_module.phases(
        config, shape, AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    )
    return sum(flops for name, (flops, _) in phases.items() if name == "update" or not supervised)


def peak_of(devices: Sequence) -> float:
    """Operations a second of all devices together, by their published peaks in
    bfloat16; 0 where one is not known.
    """
    peaks = [chips.peak(device.device_kind) for device in devices]
    return math.fsum(peaks) if all(peaks) else 0.0
