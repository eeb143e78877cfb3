"""Time the dispatches of the step, and turn their metrics into rows of the log."""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from jaxppo.config import RunConfig
from jaxppo.run.profiling import Meter


class Stopwatch:
    """Waits for the dispatch in flight, and adds its timing to its metrics."""

    def __init__(self, config: RunConfig, meter: Meter):
        self.config, self.meter = config, meter
        # (first step, metrics on the devices)
        self.in_flight: tuple[int, dict] | None = None
        self.idle = 0.0  # seconds that the devices waited for the next batch
        self.longest = 0.0  # seconds of a dispatch, other than the first
        self.first = True  # the first dispatch compiles
        self.recompilations, self.recompiled = 0.0, False
        # (step, responses of `step_metrics.first_samples`) of the last dispatch
        self.samples: list[tuple[int, np.ndarray]] = []
        self.restart()

    def restart(self) -> None:
        """Leave out the time since the last dispatch (an evaluation, a save)."""
        self.started = time.monotonic()
        self.meter.reset()

    def start(self, first_step: int, metrics: dict) -> None:
        """Time a dispatch that has been made."""
        self.in_flight = (first_step, metrics)

    @contextlib.contextmanager
    def fetching_batch(self) -> Iterator[None]:
        """Time the making of a batch: if the dispatch in flight ends before it is
        ready, the devices are idle.
        """
        began = time.monotonic()
        yield
        late = self.in_flight is not None and all(
            x.is_ready() for x in jax.tree.leaves(self.in_flight[1])
        )
        self.idle = time.monotonic() - began if late else 0.0

    def finish(self) -> list[dict[str, float]]:
        """Wait for the dispatch in flight; one row for each of its steps."""
        self.samples = []
        if self.in_flight is None:
            return []
        first_step, metrics = self.in_flight
        metrics = jax.device_get(metrics)
        samples = metrics.pop("samples", None)
        whole, steps = time.monotonic() - self.started, self.config.steps_per_call
        timing = self.meter.measure(whole, steps, idle=self.idle)
        self.recompiled = timing["recompilations"] > self.recompilations
        self.recompilations = timing["recompilations"]
        if not self.first:
            self.longest = max(self.longest, whole)
        self.in_flight, self.idle, self.first = None, 0.0, False
        self.restart()
        seconds, rows = whole / steps, []
        if samples is not None:
            each = samples[None] if steps == 1 else samples
            self.samples = list(enumerate(each, first_step))
        for k in range(steps):
            row = {name: float(x if steps == 1 else x[k]) for name, x in metrics.items()}
            row |= {
                "seconds": seconds,
                "tokens_per_second": row["length"] * self.config.rows / seconds,
            }
            rows.append({"step": first_step + k, **row, **timing})
        return rows

    def recompilation_warning(self) -> str:
        """A warning, once, after the step was compiled again."""
        if not self.recompiled:
            return ""
        self.recompiled = False
        return (
            f"the step was compiled again ({self.recompilations:.0f} times so far): every batch "
            "should have the same shape and sharding"
        )
