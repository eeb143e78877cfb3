"""Judges that may hang or crash, in processes that can be killed: one bad row costs
that row, not the run.

A thread cannot be stopped, and an alarm does not reach a loop in C; a process can
always be ended. The workers are spawned, so that they share no state, lock or device
with the training process; only bytes of a fixed form come back from them.
"""

import contextlib
import logging
import math
import multiprocessing
import os
import resource
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from jaxppo.errors import UserError

log = logging.getLogger(__name__)
ANSWER = struct.Struct("<Bd")  # (what it is, the number)
READY, GOOD, BAD = range(3)
MOST = 4096  # bytes of an answer: the number, and what was raised
START = 60.0  # seconds for a worker to import the judge


class RewardPool:
    """`pool(prompts, responses) -> [score]`, NaN for every row whose judge fails in any
    way; for `on_host(..., batched=True)`.

    Args:
        fn: `fn(prompt, response) -> float`, a function of a module (it is imported
        again in the workers). workers: processes. seconds: deadline for each row; then
        SIGTERM, and SIGKILL `grace` seconds later. memory: bytes that a worker may add
        to what it has after importing `fn` (on Linux). cpu_seconds: of a worker's whole
        life. recycle: rows after which a worker is replaced by a fresh one.

    Raises UserError when `fn` cannot be imported by a worker. It contains accidents; it
    is no sandbox against an attacker.
    """

    def __init__(
        self,
        fn: Callable[[str, str], float],
        *,
        workers: int = 2,
        seconds: float = 10.0,
        memory: int = 2 * 2**30,
        cpu_seconds: int = 600,
        recycle: int = 100,
        grace: float = 2.0,
    ):
        try:
            ForkingPickler.dumps(fn)
        except Exception as error:
            raise UserError(
                f"the judge {fn!r} is not a function of a module, which a worker could import ({error})"
            ) from None
        self.make = lambda: Worker(fn, memory, cpu_seconds)
        self.seconds, self.recycle, self.grace, self.size = seconds, recycle, grace, workers
        self.lock = threading.Lock()
        self.workers: list[Worker] = []
        self.finalizer = weakref.finalize(
            self, _end_all, self.workers
        )  # at the latest when the program ends

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One score a row, in order."""
        with self.lock:  # JAX may call from several threads
            scores = [math.nan] * len(prompts)
            left = list(range(len(prompts)))[::-1]
            while left or any(worker.row is not None for worker in self.workers):
                self._deal(left, prompts, responses)
                self._collect(scores)
            return scores

    def _deal(self, left: list[int], prompts: Sequence[str], responses: Sequence[str]) -> None:
        """A row to every idle worker; missing workers are started, worn ones
        replaced.
        """
        for worker in [w for w in self.workers if w.row is None and w.rows >= self.recycle]:
            self._end(worker)
        while len(self.workers) < min(
            self.size, len(left) + sum(w.row is not None for w in self.workers)
        ):
            self.workers.append(self.make())
        for worker in [w for w in self.workers if w.row is None][: len(left)]:
            row = left.pop()
            if not worker.ask(row, prompts[row], responses[row], self.seconds):
                left.append(row)  # it died while it was idle: no fault of this row
                self._end(worker)

    def _collect(self, scores: list[float]) -> None:
        """Wait for the next answer or deadline; a worker past its deadline, or gone,
        costs the row that it had.
        """
        busy = [w for w in self.workers if w.row is not None]
        if not busy:
            return
        pause = max(0.0, min(w.deadline for w in busy) - time.monotonic())
        ready = wait([w.pipe for w in busy], timeout=pause)
        for worker in busy:
            row = worker.row
            assert row is not None
            if worker.pipe in ready:
                score, problem = worker.answer()
                scores[row] = score
            elif time.monotonic() >= worker.deadline:
                problem = f"no answer within {self.seconds} s"
            else:
                continue
            if problem:
                log.warning("the reward of row %d failed: %s; the row is left out", row, problem)
            if worker.broken or worker.row is not None:
                self._end(worker)

    def _end(self, worker: "Worker") -> None:
        worker.end(self.grace)
        self.workers.remove(worker)

    def close(self) -> None:
        """End all workers; the next call starts new ones."""
        with self.lock:
            _end_all(self.workers)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Worker:
    """One process, and the row that it is at."""

    def __init__(self, fn: Callable, memory: int, cpu_seconds: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, fn, memory, cpu_seconds), daemon=True
        )
        with _environment():
            self.process.start()
        theirs.close()
        self.row: int | None = None
        self.rows, self.deadline, self.broken = 0, math.inf, False
        if not self.pipe.poll(START) or self._receive() is None:
            self.process.join(10.0)  # of a busy machine
            code = self.process.exitcode
            self.end(0.0)
            name = f"{fn.__module__}.{fn.__qualname__}"
            raise UserError(f"a worker could not import the judge {name} (exit code {code})")

    def ask(self, row: int, prompt: str, response: str, seconds: float) -> bool:
        """Give it a row; False when it is gone."""
        try:
            self.pipe.send_bytes(_pack(prompt, response))
        except OSError:
            return False
        self.row, self.rows, self.deadline = row, self.rows + 1, time.monotonic() + seconds
        return True

    def answer(self) -> tuple[float, str]:
        """(score, what is wrong with it)."""
        found = self._receive()
        self.row = None
        if found is None:
            self.broken = True
            self.process.join(0.5)
            return math.nan, f"its process ended (exit code {self.process.exitcode})"
        kind, score, text = found
        if kind != GOOD or not math.isfinite(score):
            return math.nan, text or f"a reward must be finite, but is {score}"
        return score, ""

    def _receive(self) -> tuple[int, float, str] | None:
        try:
            data = self.pipe.recv_bytes(MOST)
            kind, score = ANSWER.unpack(data[: ANSWER.size])
        except (EOFError, OSError, struct.error):
            return None
        return kind, score, data[ANSWER.size :].decode(errors="replace")

    def end(self, grace: float) -> None:
        self.process.terminate()
        self.process.join(grace)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()
        self.process.close()


def _end_all(workers: list[Worker]) -> None:
    while workers:
        workers.pop().end(0.2)


@contextlib.contextmanager
def _environment():
    """A worker inherits this: it never takes the accelerator. Its standard streams are
    its own affair.
    """
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        if before is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = before


def _pack(prompt: str, response: str) -> bytes:
    first, second = (text.encode("utf-8", "surrogatepass") for text in (prompt, response))
    return struct.pack("<Q", len(first)) + first + second


def _unpack(data: bytes) -> tuple[str, str]:
    (size,) = struct.unpack("<Q", data[:8])
    return tuple(
        part.decode("utf-8", "surrogatepass") for part in (data[8 : 8 + size], data[8 + size :])
    )  # type: ignore[return-value]


def _work(pipe: Connection, fn: Callable[[str, str], Any], memory: int, cpu_seconds: int) -> None:
    """A worker's life: limits, then rows until the pipe closes."""
    sink = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # a judge's own prints do not reach the run's terminal
        os.dup2(sink, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    with (
        contextlib.suppress(FileNotFoundError),
        open("/proc/self/statm") as file,
    ):  # macOS has none, and knows no such limit
        used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send_bytes(ANSWER.pack(READY, 0.0))
    while True:
        try:
            prompt, response = _unpack(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            score = fn(prompt, response)
            if isinstance(score, str) or score is None:
                raise TypeError(f"a reward must be a number, but is {str(score)[:60]!r}")
            answer = ANSWER.pack(GOOD, float(score))
        except BaseException as error:
            text = f"{type(error).__name__}: {error}".encode(errors="replace")
            answer = ANSWER.pack(BAD, math.nan) + text[: MOST - ANSWER.size]
        pipe.send_bytes(answer)
