"""Times of dispatches, with a clock that the test sets."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from runs import RUN

from jaxppo.run import stopwatch


def test_the_devices_wait_for_a_batch_that_comes_after_their_step(monkeypatch):
    """A batch of 5 s: the step that was in flight had ended, or had not."""
    now = iter([0.0, 1.0, 6.0, 7.0, 7.0, 8.0, 15.0, 15.0])
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(monotonic=lambda: next(now)))
    found = []
    measure = lambda seconds, steps, idle: found.append((seconds, idle)) or {"recompilations": 0.0}
    clock: Any = stopwatch.Stopwatch(RUN, SimpleNamespace(measure=measure, reset=lambda: None))
    for ready in (True, False):
        metrics = {"length": SimpleNamespace(is_ready=lambda ready=ready: ready)}
        clock.start(1, metrics)
        with clock.fetching_batch():
            pass
        clock.in_flight = (1, {"length": jnp.float32(1)})
        clock.finish()
    assert found == [(7.0, 5.0), (8.0, 0.0)]


def test_stopwatch_shares_the_time_among_the_steps_of_a_dispatch(monkeypatch):
    now = iter([10.0, 16.0, 16.0, 20.0, 20.0])
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(monotonic=lambda: next(now)))
    meter = SimpleNamespace(
        measure=lambda seconds, steps, idle: {"recompilations": 0.0}, reset=lambda: None
    )
    clock = stopwatch.Stopwatch(replace(RUN, steps_per_call=3), meter)
    metrics = {"length": jnp.array([1.0, 2.0, 3.0])}
    clock.start(7, metrics)
    rows = clock.finish()
    assert [row["step"] for row in rows] == [7, 8, 9]
    assert [row["seconds"] for row in rows] == [2.0] * 3  # 6 seconds of 3 steps
    assert [row["tokens_per_second"] for row in rows] == [
        2.0,
        4.0,
        6.0,
    ]  # 4 rows of 1, 2, 3 tokens in 2 seconds
    assert clock.longest == 0.0  # the first one compiles
    assert clock.finish() == []
    clock.start(10, metrics)
    clock.finish()
    assert clock.longest == 4.0
