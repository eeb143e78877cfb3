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

from jaxppo import algorithms, parallel, ppo, train
from jaxppo.config import validate_run
from jaxppo.costs import phases
from jaxppo.data.prompts import PromptSet, encode
from jaxppo.errors import UserError
from jaxppo.models.shapes import llama
from jaxppo.run import load, profiling
from jaxppo.types import Prompts

SHAPE = llama(vocab_size=11, width=8, num_layers=2, num_heads=2)


@pytest.fixture
def meter():
    """One of a step with 100 operations on chips that do 50 a second, and a clock that the test
    sets.
    """
    now = SimpleNamespace(t=10.0)
    found = profiling.Meter(SimpleNamespace(traces=1), flops=100.0, peak=50.0, clock=lambda: now.t)
    yield found, now
    found.close()


def test_numbers(meter):
    meter, now = meter
    meter.on_event(profiling.TRACED, 0.5)  # a function within
    meter.on_event(profiling.TRACED, 1.0)  # the step itself, the other among it
    for event, seconds in zip(profiling.COMPILED, (0.5, 2.5)):
        meter.on_event(event, seconds)
    meter.on_event("/jax/something_else", 99.0)
    now.t = 20.0
    first = meter.measure(8.0, 1)  # 4 of the 8 seconds were compilation, of the 10 since the start
    assert first == {"compile_seconds": 4.0, "goodput": 0.4, "recompilations": 0.0}
    meter.reset()
    now.t = 30.0
    assert meter.measure(8.0, 2) == {
        "goodput": 0.6,
        "recompilations": 0.0,
        "mfu": 0.5,
    }  # 12 of 20 s; 200 of 8 · 50 operations


def test_seconds_that_devices_wait_for_a_batch_are_not_productive(meter):
    """12 s, of which 9 went to the batch; the operations are over all of the 12."""
    meter, now = meter
    now.t = 22.0
    found = meter.measure(12.0, 3, idle=9.0)
    assert found == {
        "goodput": 0.25,
        "recompilations": 0.0,
        "mfu": 0.5,
    }  # 3 of 12 s; 300 of 12 x 50 operations


def test_every_trace_after_the_first_is_a_recompilation(meter):
    meter, _ = meter
    for traces, want in ((1, 0), (2, 1), (2, 1), (5, 4)):
        meter.step.traces = traces
        assert meter.measure(1.0, 1)["recompilations"] == want


def test_a_batch_of_another_shape_compiles_the_step_again(meter):
    step, state, prompts = step_of("jit")
    meter, _ = meter
    meter.step = step
    found = []
    for rows in (2, 2, 1, 2):
        meter.reset()
        state, _ = step(state, jax.tree.map(lambda x, rows=rows: x[:rows], prompts))
        found += [meter.measure(1.0, 1)["recompilations"]]
    assert found == [0, 0, 1, 1]


def test_jax_tells_what_it_compiles(meter):
    meter, _ = meter
    jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(7)).block_until_ready()
    assert meter.measure(1e6, 1)["compile_seconds"] > 0
    meter.reset()
    assert "compile_seconds" not in meter.measure(1.0, 1)


def test_a_compilation_without_a_trace_is_counted_where_it_is_the_steps(meter):
    """Once a dispatch; not the first, not another function's, not outside of a dispatch, and not
    beside a trace.
    """
    meter, _ = meter
    theirs = [(profiling.BACKEND, "jit(traced)"), (profiling.BACKEND, "jit(traced)")]
    other = [
        (profiling.BACKEND, "jit(tanh)"),
        (profiling.COMPILED[0], "jit(traced)"),
        (profiling.TRACED, "traced"),
    ]
    for traces, heard, want in (
        (1, theirs, 0),
        (1, other, 0),
        (1, theirs, 1),
        (1, [], 1),
        (2, theirs, 2),
        (3, theirs, 3),
        (3, theirs[1:], 4),
    ):
        meter.on_event(profiling.BACKEND, 1.0, fun_name="jit(traced)")
        meter.reset()  # as the loop does before a dispatch
        meter.step.traces = traces
        for event, name in heard:
            meter.on_event(event, 1.0, fun_name=name)
        assert meter.measure(1.0, 1)["recompilations"] == want


def step_of(mode: str):
    """A step that adds the number of rows to a weight, with its state and two prompts in their
    places.
    """

    def make(axis_name):
        def train_step(state, prompts):
            number = jnp.asarray(prompts.index.size, jnp.float32)
            total = number if axis_name is None else jax.lax.psum(number, axis_name)
            return state.replace(params={"w": state.params["w"] + total}), {"loss": total}

        return train_step

    step = parallel.compile_for_mode(
        make, mode=mode, mesh="data=2" if mode == "mesh" else "", devices=jax.devices()[:2]
    )
    state = ppo.init_state(
        RUN, {"w": jnp.zeros(4)}, {"base": {}, "reference": None, "reward": {}}, jax.random.key(0)
    )
    tokens = np.zeros((2, 3), np.int32)
    return (
        step,
        step.place(state),
        step.put(Prompts(tokens, tokens > 0, np.arange(2, dtype=np.int32))),
    )


@pytest.mark.parametrize("mode", ["jit", "pmap", "mesh"])
def test_the_steps_own_compilation_is_known_by_its_name(mode):
    step, state, prompts = step_of(mode)
    meter = profiling.Meter(step)
    for want in (True, False):
        state, metrics = step(state, prompts)
        jax.jit(lambda x: x * 2.5)(metrics["loss"])
        assert meter.step_compiled == want
        assert meter.measure(1.0, 1)["recompilations"] == 0
        meter.reset()
    meter.close()


def test_the_same_shapes_elsewhere_are_compiled_again(meter):
    """JAX traces nothing anew for a state that lies on another device."""
    step, state, prompts = step_of("jit")
    meter, _ = meter
    meter.step = step
    found = []
    for place in (None, None, jax.devices()[1], None, jax.devices()[2]):
        if place is not None:
            state, prompts = jax.device_put(state, place), jax.device_put(prompts, place)
        meter.reset()
        state, _ = step(state, prompts)
        found += [meter.measure(1.0, 1)["recompilations"]]
    assert found == [0, 0, 1, 1, 2] and step.traces == 1


def test_flops_are_those_of_the_plan():
    config = replace(RUN, lora=0)
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    forward = phases.phase_costs(config, SHAPE, mesh)["generate"][0]
    assert forward > 0
    assert profiling.step_flops(config, SHAPE, supervised=False) == pytest.approx(
        forward * 5
    )  # 1 + 1 + 3
    assert profiling.step_flops(config, SHAPE, supervised=True) == pytest.approx(forward * 3)
    assert profiling.step_flops(config, replace(SHAPE, kind="gru"), supervised=False) == 0


def test_flops_of_a_critic_of_its_own():
    """A second body without a head: it reads in the rollout and learns in the update, and no
    reference has one. RUN has four rows of seven tokens.
    """
    shared, separate = (
        replace(RUN, lora=0, value_loss="mse", critic=x) for x in ("shared", "separate")
    )
    blocks, _ = phases.matrix_parameters(SHAPE)
    body = RUN.rows * (2 * blocks * RUN.length + 4 * 2 * 8 * RUN.length**2 / 2)
    of = lambda config, supervised=False: profiling.step_flops(config, SHAPE, supervised=supervised)
    assert of(separate) - of(shared) == pytest.approx(body * (1 + 3 * RUN.epochs))
    assert of(replace(separate, lora=2)) - of(replace(shared, lora=2)) == pytest.approx(
        body * (1 + 2 * RUN.epochs)
    )
    assert of(replace(separate, value_loss="none")) == of(shared)
    assert of(separate, supervised=True) == of(shared, supervised=True)
    one = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    (_, alone), (_, beside) = (
        phases.phase_costs(config, SHAPE, one)["generate"] for config in (shared, separate)
    )
    blocks *= (
        4  # bytes of float32, read for each token; and keys and values of all slots of the cache
    )
    cache = 2 * 2 * 2 * 4 * 4 * RUN.rows * RUN.length
    assert beside - alone == pytest.approx(RUN.response_length * (blocks + cache))


@pytest.mark.parametrize("text", ["0:3", "6:3", "3:", ":3", "a", "3:6:9", "-1:3"])
def test_a_range_that_is_none(text):
    with pytest.raises(UserError, match="--profile"):
        validate_run(replace(RUN, profile=text))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("calls", "steps", "traced"),
    [(1, "3:6", [3, 4, 5, 6]), (4, "3:6", [1, 5]), (8, "3:6", [1]), (4, "9:9", [9]), (1, "", [])],
)
def test_every_dispatch_that_has_one_of_the_steps_is_traced(
    tmp_path, monkeypatch, calls, steps, traced
):
    """Of several steps in a call the whole call, wherever it begins."""
    trace, found = profiling.Trace(replace(RUN, profile=steps), tmp_path), []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    for begins in range(1, 13, calls):
        trace.before(begins, begins + calls - 1)
        found += [begins] if trace.on else []
    assert found == traced


@pytest.mark.ci
def test_a_trace_has_the_regions_of_the_step(tmp_path):
    config, policy = load.load_policy(replace(RUN, profile="2:3", runs=str(tmp_path)))
    prompts = PromptSet(*encode(TEXTS, policy.tokenizer, config.prompt_length))
    reward = lambda params, rollout: (rollout.mask.sum(1), jnp.ones(rollout.mask.shape[0], bool))

    train.fit(config, policy, algorithms.make_parts(config, reward), prompts, folder=tmp_path)
    (place,) = (tmp_path / "profile").rglob("*.xplane.pb")
    data = place.read_bytes()
    for region in (b"rollout", b"generate", b"reference", b"reward", b"advantages", b"update"):
        assert b"/" + region + b"/" in data, region
    events = json.loads(gzip.decompress(next(place.parent.glob("*.trace.json.gz")).read_bytes()))[
        "traceEvents"
    ]
    assert len(events) > 100
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["recompilations"] for row in rows] == [0.0] * 4
    assert rows[0]["compile_seconds"] > 0 and "compile_seconds" not in rows[1]
    assert (
        all(0 < row["goodput"] <= 1 for row in rows) and "mfu" not in rows[1]
    )  # a CPU's peak is not known
