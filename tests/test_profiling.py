"""Where a run's time went: the meter with a clock of its own, and a trace of a real step."""

import gzip
import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import RUN, TEXTS

from jaxppo import costs, profiling, train
from jaxppo.config import UserError, llama, validate_run

SHAPE = llama(vocab_size=11, width=8, num_layers=2, num_heads=2)


@pytest.fixture
def meter():
    """One of a step with 100 operations on chips that do 50 a second, and a clock that the test sets."""
    now = SimpleNamespace(t=10.0)
    found = profiling.Meter(SimpleNamespace(traces=1), flops=100.0, peak=50.0, clock=lambda: now.t)
    yield found, now
    found.close()


def test_numbers(meter):
    meter, now = meter
    meter.saw({"x": np.zeros((2, 3))})
    meter.hear(profiling.TRACED, 0.5)  # a function within
    meter.hear(profiling.TRACED, 1.0)  # the step itself, the other among it
    for event, seconds in zip(profiling.COMPILED, (0.5, 2.5)):
        meter.hear(event, seconds)
    meter.hear("/jax/something_else", 99.0)
    now.t = 20.0
    first = meter.numbers(8.0, 1)  # 4 of the 8 seconds were compilation, of the 10 since the start
    assert first == {"compile_seconds": 4.0, "goodput": 0.4, "recompilations": 0.0}
    meter.forget()
    now.t = 30.0
    assert meter.numbers(8.0, 2) == {"goodput": 0.6, "recompilations": 0.0, "mfu": 0.5}  # 12 of 20 s; 200 of 8 · 50 operations


def test_another_shape_is_no_recompilation_and_the_same_is(meter):
    meter, _ = meter
    for shape, traces, want in (((2,), 1, 0), ((3,), 2, 0), ((2,), 2, 0), ((2,), 3, 1)):
        meter.saw(np.zeros(shape))
        meter.step.traces = traces
        assert meter.numbers(1.0, 1)["recompilations"] == want


def test_jax_tells_what_it_compiles(meter):
    meter, _ = meter
    jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(7)).block_until_ready()
    assert meter.numbers(1e6, 1)["compile_seconds"] > 0
    meter.forget()
    assert "compile_seconds" not in meter.numbers(1.0, 1)


def test_flops_are_those_of_the_plan():
    config = replace(RUN, lora=0)
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    forward = costs.phases(config, SHAPE, mesh)["generate"][0]
    assert forward > 0
    assert profiling.flops_of(config, SHAPE, supervised=False) == pytest.approx(forward * 5)  # 1 + 1 + 3
    assert profiling.flops_of(config, SHAPE, supervised=True) == pytest.approx(forward * 3)
    assert profiling.flops_of(config, replace(SHAPE, kind="gru"), supervised=False) == 0


def test_peaks():
    chips = [SimpleNamespace(device_kind="TPU v5 lite")] * 4
    assert profiling.peak_of(chips) == 4 * 197e12
    assert profiling.peak_of([*chips, SimpleNamespace(device_kind="cpu")]) == 0


@pytest.mark.parametrize("text", ["0:3", "6:3", "3:", ":3", "a", "3:6:9", "-1:3"])
def test_a_range_that_is_none(text):
    with pytest.raises(UserError, match="--profile"):
        validate_run(replace(RUN, profile=text))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("calls", "steps", "traced"),
    [(1, "3:6", [3, 4, 5, 6]), (4, "3:6", [1, 5]), (8, "3:6", [1]), (4, "9:9", [9]), (1, "", [])],
)
def test_every_dispatch_that_has_one_of_the_steps_is_traced(tmp_path, monkeypatch, calls, steps, traced):
    """Of several steps in a call the whole call, wherever it begins."""
    trace, found = profiling.Trace(replace(RUN, profile=steps), tmp_path), []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    for begins in range(1, 13, calls):
        trace.before(begins, begins + calls - 1)
        found += [begins] if trace.on else []
    assert found == traced


def test_a_trace_has_the_regions_of_the_step(tmp_path):
    config, policy = train.load_policy(replace(RUN, profile="2:3", runs=str(tmp_path)))
    prompts = train.PromptSet(*train.encode(TEXTS, policy.tokenizer, config.prompt_length))
    reward = lambda params, rollout: (rollout.mask.sum(1), jnp.ones(rollout.mask.shape[0], bool))
    from jaxppo import algorithms

    train.fit(config, policy, algorithms.make_parts(config, reward), prompts, folder=tmp_path)
    (place,) = (tmp_path / "profile").rglob("*.xplane.pb")
    data = place.read_bytes()
    for region in (b"rollout", b"generate", b"reference", b"reward", b"advantages", b"update"):
        assert b"/" + region + b"/" in data, region
    events = json.loads(gzip.decompress(next(place.parent.glob("*.trace.json.gz")).read_bytes()))["traceEvents"]
    assert len(events) > 100
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["recompilations"] for row in rows] == [0.0] * 4
    assert rows[0]["compile_seconds"] > 0 and "compile_seconds" not in rows[1]
    assert all(0 < row["goodput"] <= 1 for row in rows) and "mfu" not in rows[1]  # a CPU's peak is not known
