"""SIGTERM and Ctrl-C: the step in flight is finished, the state saved, and the process
ends with exit code 75.
"""

import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

from jaxppo.errors import Interrupted

GRACE = 30.0  # seconds between the notice and the end of a preempted machine


class Stopping:
    """Listens while it is open (a context manager), and says after each step whether to
    stop.

    One process listens itself; a second signal ends it at once. Of several, JAX's
    preemption notifier carries a SIGTERM that one of them receives to all, so that they
    stop after the same step. Once JAX is distributed it swallows SIGTERM unless it is
    asked after every step: always ask.
    """

    def __init__(self) -> None:
        self.received = 0
        self.warned = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Stopping":
        own = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
        for number in own:
            self.before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received:
            os.write(2, f"{name} again: stopping at once\n".encode())
            os._exit(128 + number)
        self.received = number
        if jax.process_count() > 1:  # to JAX's notifier, which tells the others
            os.kill(os.getpid(), signal.SIGTERM)
        os.write(2, f"{name}: stopping after this step; once more to stop at once\n".encode())

    def due(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received != 0

    def too_slow(self, seconds: float) -> str:
        """A warning, once, when a dispatch takes so long that a preempted machine may
        not get to save.
        """
        if self.warned or seconds <= GRACE / 2:
            return ""
        self.warned = True
        return (
            f"a dispatch takes {seconds:.0f} s, and a preempted machine has {GRACE:.0f} s: it may lose the steps since "
            "its last checkpoint; lower --steps-per-call, --batch-size or --response-length"
        )


def stop_before_training() -> None:
    """SIGTERM ends the process with 75 from now on, until a `Stopping` listens: there
    is nothing to save yet.
    """

    def handler(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted(
            "stopped by SIGTERM outside of training; nothing is lost, start again with --resume"
        )

    if not jax.distributed.is_initialized():  # then JAX's notifier has it
        signal.signal(signal.SIGTERM, handler)
