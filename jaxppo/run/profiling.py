"""Where a run's time goes: compilation, goodput, use of the chip, and JAX traces.

metrics.jsonl has beside the step's own metrics:

- `compile_seconds`: tracing and compiling, where there was any.
- `recompilations`: how often the step was compiled beyond the first time. Above 0
  something is wrong, such as a batch of another shape or sharding.
- `goodput`: the share of the time since training began in this process that was spent
  in steps: not in compilation, evaluations, saves or waiting for a batch.
- `mfu`, on known chips: the step's operations (`costs.phases`) over what the chips can
  do in its seconds at their 16-bit peak, whatever --dtype
  (https://arxiv.org/abs/2204.02311, appendix B).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from jaxppo.config import RunConfig, profiled_steps
from jaxppo.costs.phases import phase_costs
from jaxppo.models.shapes import ModelConfig
from jaxppo.parallel import CompiledStep

# JAX's names of events; the first also comes for functions within functions
TRACED = "/jax/core/compile/jaxpr_trace_duration"
BACKEND = "/jax/core/compile/backend_compile_duration"
COMPILED = ("/jax/core/compile/jaxpr_to_mlir_module_duration", BACKEND)
# JAX's names of a `CompiledStep`: under jit or over a mesh, and under pmap
STEPS = ("jit(traced)", "jit(_fun)")


class Trace:
    """A JAX trace of some steps in <folder>/profile, for TensorBoard, XProf or
    Perfetto.

    Its regions are those of `ppo.py`: rollout (with generate and reference), reward,
    advantages, update.
    """

    def __init__(self, config: RunConfig, folder: Path):
        self.first, self.last = profiled_steps(config)
        self.folder, self.on = folder / "profile", False

    def before(self, first_step: int, last_step: int) -> None:
        """Start or stop before the dispatch of these steps; dispatches are traced
        whole.
        """
        if self.on and first_step > self.last:
            self.close()
        if not self.on and first_step <= self.last and self.first <= last_step:
            jax.profiler.start_trace(str(self.folder))
            self.on = True

    def close(self) -> None:
        """Write the trace, if one is being made."""
        if self.on:
            self.on = False
            jax.profiler.stop_trace()


class Meter:
    """Turns the seconds of dispatches into the metrics above."""

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
        self.traces = 0  # of the step, until the last dispatch
        self.untraced = 0  # times that the step was compiled again without being traced
        self.reset()
        jax.monitoring.register_event_duration_secs_listener(self.on_event)

    def on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Called by JAX when something was traced or compiled."""
        if event == TRACED:
            self.tracing = max(self.tracing, duration_secs)  # of the outermost function
        elif event in COMPILED:
            self.compiling += duration_secs
            self.step_compiled |= event == BACKEND and kwargs.get("fun_name") in STEPS

    def reset(self) -> None:
        """Forget what was compiled until now: it was not the step."""
        self.tracing, self.compiling, self.step_compiled = 0.0, 0.0, False

    def measure(self, seconds: float, steps: int, *, idle: float = 0.0) -> dict[str, float]:
        """The metrics of a dispatch.

        Args:
          seconds: wall-clock time, including compilation and `idle`.
          steps: number of steps in the dispatch.
          idle: seconds that the devices waited for a batch.
        """
        compiled = self.tracing + self.compiling
        run = max(seconds - compiled, 0.0)
        self.productive += max(run - idle, 0.0)
        # The same shapes with another sharding: compiled again, but not traced again.
        self.untraced += self.step_compiled and self.step.traces == self.traces
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
        """Stop listening to JAX's events."""
        jax.monitoring.unregister_event_duration_listener(self.on_event)


def step_flops(config: RunConfig, shape: ModelConfig, *, supervised: bool) -> float:
    """Operations of one step over all devices (`costs.phases`); 0 for networks other
    than transformers.
    """
    if shape.kind != "transformer":
        return 0.0
    mesh = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    if supervised:  # no rollout, and no critic
        return phase_costs(replace(config, value_loss="none"), shape, mesh)["update"][0]
    return sum(flops for flops, _ in phase_costs(config, shape, mesh).values())
