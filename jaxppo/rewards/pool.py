"""Score with judges that may hang or crash: each row runs in a process that can be
killed, so a fault costs one row, not the run.

A thread cannot be stopped, and an alarm does not interrupt C code. A process can always
be killed. Workers are spawned, so they share no state, lock or device with training.
"""

import contextlib
import logging
import math
import os
import resource
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import ForkingPickler
from unittest import mock

from pebble import ProcessExpired, ProcessPool

from jaxppo.errors import UserError

log = logging.getLogger(__name__)
MAX_MESSAGE = 4096  # characters of an exception that come back from a worker
Judge = Callable[[str, str], float]


class RewardPool:
    """`pool(prompts, responses) -> scores`, NaN where the judge fails; for
    `on_host(..., batched=True)`.

    Args:
        fn: `fn(prompt, response) -> float`, a function that workers can import.
        workers: number of processes.
        seconds: deadline of each row; then SIGTERM, and SIGKILL 3 seconds later.
        memory: bytes that a worker may allocate after importing `fn` (Linux only).
        cpu_seconds: CPU time of a worker in its whole life.
        recycle: rows after which a worker is replaced.

    Raises UserError when workers cannot import `fn`. The pool contains accidents; it is
    no sandbox against an attacker.
    """

    def __init__(
        self,
        fn: Judge,
        *,
        workers: int = 2,
        seconds: float = 10.0,
        memory: int = 2 * 2**30,
        cpu_seconds: int = 600,
        recycle: int = 100,
    ):
        try:
            ForkingPickler.dumps(fn)
        except Exception as error:
            raise UserError(
                f"workers cannot import the judge {fn!r}: define it in a module ({error})"
            ) from None
        self.fn, self.seconds = fn, seconds
        limits = (fn, memory, cpu_seconds)
        self.make_pool = lambda: ProcessPool(workers, recycle, _limit, limits, CpuContext())
        self.lock = threading.Lock()
        self.stop: Callable[[], object] = lambda: None
        self._restart()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return one score per row, in order."""
        rows = list(zip(prompts, responses, strict=True))
        scores: dict[int, float] = {}
        with self.lock:  # JAX may call from several threads
            # A worker that dies while idle breaks the pool: score the rest in a second.
            for _ in range(2):
                with contextlib.suppress(RuntimeError):  # BrokenProcessPool is one
                    futures = {
                        row: self.pool.schedule(_score, (self.fn, *texts), timeout=self.seconds)
                        for row, texts in enumerate(rows)
                        if row not in scores
                    }
                    for row, future in futures.items():
                        scores[row] = self._result(row, future)
                    return [scores[row] for row in range(len(rows))]
                self._restart()
        name = f"{self.fn.__module__}.{self.fn.__qualname__}"
        raise UserError(f"workers could not import the judge {name}; see their traceback above")

    def _result(self, row: int, future: Future) -> float:
        """Wait for the score of a row; NaN and a warning when it failed."""
        try:
            score, problem = future.result()
        except TimeoutError:
            score, problem = math.nan, f"no answer within {self.seconds} s"
        except ProcessExpired as error:
            score, problem = math.nan, f"its process ended (exit code {error.exitcode})"
        if problem or not math.isfinite(score):
            problem = problem or f"a reward must be finite, but is {score}"
            log.warning("the reward of row %d failed: %s; the row is left out", row, problem)
            return math.nan
        return score

    def _restart(self) -> None:
        """Stop all workers. The first row starts new ones."""
        self.stop()
        self.pool = self.make_pool()
        # Runs at the latest when this object is deleted, or the program ends.
        self.stop = weakref.finalize(self, _stop, self.pool)

    def close(self) -> None:
        """Stop all workers; the next call starts new ones."""
        with self.lock:
            self._restart()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class CpuProcess(SpawnProcess):
    """A process that inherits JAX_PLATFORMS=cpu: it never takes the accelerator."""

    def start(self) -> None:
        with mock.patch.dict(os.environ, JAX_PLATFORMS="cpu"):
            super().start()


class CpuContext(SpawnContext):
    Process = CpuProcess  # type: ignore[assignment]


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _limit(fn: Judge, memory: int, cpu_seconds: int) -> None:
    """Silence and limit a worker. By now it has imported the judge `fn`."""
    sink = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # a judge's prints must not reach the terminal
        os.dup2(sink, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open until the end)
    # macOS has no /proc and does not enforce this limit
    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _score(fn: Judge, prompt: str, response: str) -> tuple[float, str]:
    """Return (score, what went wrong), in a worker."""
    try:
        score = fn(prompt, response)
        if isinstance(score, str) or score is None:
            raise TypeError(f"a reward must be a number, but is {str(score)[:60]!r}")
        return float(score), ""
    except BaseException as error:
        return math.nan, f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
