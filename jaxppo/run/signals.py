"""Stop on SIGTERM and Ctrl-C: finish the step, save, and exit with code 75."""

import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

from jaxppo.errors import Interrupted

GRACE = 30.0  # seconds between the notice and the end of a preempted machine


class StopSignals:
    """A context manager that catches signals; after each step, ask `should_stop`.

    A second signal ends the process at once. Of several processes, JAX's preemption
    notifier tells all of a SIGTERM to one, so that they stop after the same step. With
    JAX distributed, SIGTERM is swallowed unless `should_stop` is called every step.
    """

    def __init__(self) -> None:
        self.received = 0
        self.warned = False
        self.handlers: dict[int, object] = {}  # to restore

    def __enter__(self) -> "StopSignals":
        own = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
        for number in own:
            self.handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received:
            os.write(2, f"{name} again: stopping at once\n".encode())
            os._exit(128 + number)
        self.received = number
        if jax.process_count() > 1:  # JAX's notifier tells the other processes
            os.kill(os.getpid(), signal.SIGTERM)
        os.write(2, f"{name}: stopping after this step; once more to stop at once\n".encode())

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received != 0

    def slow_warning(self, seconds: float) -> str:
        """A warning, once, if a dispatch takes so long that a preempted machine may not
        get to save.
        """
        if self.warned or seconds <= GRACE / 2:
            return ""
        self.warned = True
        return (
            f"a dispatch takes {seconds:.0f} s, and a preempted machine has {GRACE:.0f} s: it may "
            "lose the steps since its last checkpoint; lower --steps-per-call, --batch-size or "
            "--response-length"
        )


def exit_on_sigterm() -> None:
    """Outside of training, let SIGTERM raise Interrupted: there is nothing to save."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted(
            "stopped by SIGTERM outside of training; nothing is lost, start again with --resume"
        )

    if not jax.distributed.is_initialized():  # or JAX's notifier handles it
        signal.signal(signal.SIGTERM, handler)
