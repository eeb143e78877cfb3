"""Call judges and tools that may hang or crash: each row runs in a process that can be
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
from inspect import Parameter, Signature, signature
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Self
from unittest import mock

from pebble import ProcessExpired, ProcessPool

from jaxppo.errors import UserError

log = logging.getLogger(__name__)
MAX_MESSAGE = 4096  # characters of an exception that come back from a worker
# tool(state, the text of a turn) -> (state, reply, reward, whether the episode is over)
Tool = Callable[[Any, str], tuple[Any, str, float, bool]]
Outcome = tuple[Any, str]  # what a function returned, and what went wrong or ""


class WorkerPool:
    """`pool.call(rows) -> outcomes`: what a function returns for each row's arguments,
    or what went wrong with it.

    Args:
        fn: a function that workers can import.
        workers: number of processes.
        seconds: deadline of each row; then SIGTERM, and SIGKILL 3 seconds later.
        memory: bytes that a worker may allocate after importing `fn` (Linux only).
        cpu_seconds: CPU time of a worker in its whole life.
        recycle: rows after which a worker is replaced.

    Raises UserError when workers cannot import `fn`. The pool contains accidents; it is
    no sandbox against an attacker.
    """

    kind = "function"
    check: Callable[[Any], Any]  # of what `fn` returns, in the worker; raises TypeError

    def __init__(
        self,
        fn: Callable[..., Any],
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
                f"workers cannot import the {self.kind} {fn!r}: define it in a module ({error})"
            ) from None
        self.fn, self.seconds = fn, seconds
        limits = (fn, memory, cpu_seconds)
        self.make_pool = lambda: ProcessPool(workers, recycle, _limit, limits, CpuContext())
        self.lock = threading.Lock()
        self.stop: Callable[[], object] = lambda: None
        self._restart()

    def call(self, rows: Sequence[tuple], named: Sequence[dict] = ()) -> list[Outcome]:
        """Return one outcome per row, in order. `rows`: arguments by position, `named`
        by name.
        """
        named = named or [{}] * len(rows)
        found: dict[int, Outcome] = {}
        with self.lock:  # JAX may call from several threads
            # A worker that dies while idle breaks the pool: call the rest in a second.
            for _ in range(2):
                with contextlib.suppress(RuntimeError):  # BrokenProcessPool is one
                    futures = {
                        row: self.pool.schedule(
                            _call, (self.fn, type(self).check, *both), timeout=self.seconds
                        )
                        for row, both in enumerate(zip(rows, named, strict=True))
                        if row not in found
                    }
                    for row, future in futures.items():
                        found[row] = self._result(future)
                    return [found[row] for row in range(len(rows))]
                self._restart()
        name = f"{self.fn.__module__}.{self.fn.__qualname__}"
        raise UserError(
            f"workers could not import the {self.kind} {name}; see their traceback above"
        )

    def _result(self, future: Future) -> Outcome:
        """Wait for the outcome of a row."""
        try:
            return future.result()
        except TimeoutError:
            return None, f"no answer within {self.seconds} s"
        except ProcessExpired as error:
            return None, f"its process ended (exit code {error.exitcode})"
        except RuntimeError:  # the pool is broken
            raise
        except Exception as error:  # the arguments cannot be sent
            return None, f"{type(error).__name__}: {error}"[:MAX_MESSAGE]

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check_score(answer: Any) -> float:
    """The score that a judge returned. Raises TypeError if it is no number."""
    if isinstance(answer, str) or answer is None:
        raise TypeError(f"a reward must be a number, but is {str(answer)[:60]!r}")
    return float(answer)


class RewardPool(WorkerPool):
    """`pool(prompts, responses, **columns) -> scores`, NaN where the judge fails: a
    reward of `train.policy`, or for `on_host(..., batched=True)`. The judge is
    `fn(prompt, response, **columns) -> float`; the pool has the columns that it names.
    """

    kind, check = "judge", check_score

    def __init__(self, fn: Callable[..., Any], **limits: Any):
        super().__init__(fn, **limits)
        texts = [Parameter(x, Parameter.POSITIONAL_OR_KEYWORD) for x in ("prompts", "responses")]
        columns = list(signature(fn).parameters.values())[2:]
        self.__signature__ = Signature([*texts, *columns])

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        """Return one score per row, in order."""
        rows = list(zip(prompts, responses, strict=True))
        named = [{name: x[row] for name, x in columns.items()} for row in range(len(rows))]
        outcomes = self.call(rows, named)
        return [_score(row, *outcome) for row, outcome in enumerate(outcomes)]


def check_answer(answer: Any) -> tuple[Any, str, float, bool]:
    """What a tool returned. Raises TypeError if a `Tool` returns something else."""
    if not (isinstance(answer, tuple) and len(answer) == 4 and isinstance(answer[1], str)):
        raise TypeError(
            f"a tool must return (state, reply, reward, done), but it is {str(answer)[:60]!r}"
        )
    state, reply, reward, done = answer
    return state, reply, check_score(reward), bool(done)


class ToolPool(WorkerPool):
    """A tool in processes that can be killed, for `environments.host.on_host`. The tool
    is a `Tool`; the state travels with every call, so it should be small.
    """

    kind, check = "tool", check_answer


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


def _limit(fn: Callable, memory: int, cpu_seconds: int) -> None:
    """Silence and limit a worker. By now it has imported `fn`."""
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


def _call(fn: Callable, check: Callable[[Any], Any], args: tuple, named: dict) -> Outcome:
    """Return (the answer, what went wrong), in a worker. An answer that cannot be sent
    is wrong, too.
    """
    try:
        answer = check(fn(*args, **named))
        ForkingPickler.dumps(answer)
        return answer, ""
    except BaseException as error:
        return None, f"{type(error).__name__}: {error}"[:MAX_MESSAGE]


def _score(row: int, score: Any, problem: str) -> float:
    """Return the score of a row; NaN and a warning when it failed."""
    if problem or not math.isfinite(score):
        problem = problem or f"a reward must be finite, but is {score}"
        log.warning("the reward of row %d failed: %s; the row is left out", row, problem)
        return math.nan
    return score
