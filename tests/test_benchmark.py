"""The benchmark's floor against arithmetic by hand, and a tiny run from the command line. Nothing
here is timed.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxppo.models.shapes import gpt2, llama

pytestmark = pytest.mark.ci

BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


floor = load("floor")
# one layer: q, k, v, o of 4 x 4 (64 numbers), up and down of 4 x 16 (128 numbers); head of 10 x 4
# (40 numbers)
MODEL = gpt2(vocab_size=10, width=4, num_layers=1, num_heads=2, max_length=5)
WORK = floor.Work(MODEL, rows=2, prompt=2, response=3, epochs=3, minibatches=2)


def test_weights_by_hand():
    assert floor.weights(MODEL) == (192, 40)
    assert floor.matrices(MODEL) == {(4, 4): 4, (4, 16): 1, (16, 4): 1}


def test_weights_of_a_gated_model_with_shared_keys():
    # q, o 8 x 8; k, v 8 x 4; gate, up 8 x 24; down 24 x 8
    model = llama(vocab_size=16, width=8, num_layers=3, num_heads=2, num_kv_heads=1)
    assert floor.weights(model) == (3 * (2 * 64 + 2 * 32 + 3 * 192), 128)


def test_operations_by_hand():
    # one forward pass: 2 rows x 5 tokens x 2 x 192 = 3840; attention 2 rows x 4 x 4 wide x
    # (1+2+3+4+5) = 480; head: 2 rows x 3 tokens x 2 x 40 = 480. Sum 4800; training is 3 times that,
    # in 3 epochs
    counted = floor.gflop(WORK)
    assert counted["reference"] * 1e9 == pytest.approx(4800)
    assert counted["update"] * 1e9 == pytest.approx(3 * 3 * 4800)
    # prompts: 2 x 2 x 384 + attention 2 x 16 x (1+2) = 1632; decoding: 3 steps x 2 rows x (384 +
    # 80) = 2784, and attention over 3, 4, 5 tokens: 2 x 16 x 12 = 384
    assert counted["generate"] * 1e9 == pytest.approx(1632 + 2784 + 384)
    assert sum(floor.gflop(floor.WORKS["S/32"]).values()) == pytest.approx(395, abs=1)


def test_operations_of_the_peer_by_hand():
    # logits of all 10 tokens: 800; policy 3840 + 480 + 800, value model 3840 + 480; reference and
    # value pass once, then 9 times
    assert floor.peer_gflop(WORK) * 1e9 == pytest.approx(4800 + 10 * (5120 + 4320))
    assert floor.peer_gflop(floor.WORKS["S/32"]) == pytest.approx(706, abs=1)


def test_seconds_by_hand_when_memory_is_free():
    parts = floor.seconds(WORK, floor.Rates(gemm=100.0, memory=1e30), itemsize=4, parameters=7)
    assert parts["reference"] == pytest.approx(48)
    assert parts["generate"] == pytest.approx(48)
    assert parts["adam"] == pytest.approx(0)


def test_seconds_by_hand_when_arithmetic_is_free():
    # decoding reads 232 weights and 2 x 2 rows x 4 wide x (3, 4, 5) cached numbers: 280 + 296 + 312
    # = 888, in 2 bytes each
    parts = floor.seconds(WORK, floor.Rates(gemm=1e30, memory=10.0), itemsize=2, parameters=7)
    assert parts["generate"] == pytest.approx(177.6)
    # 7 parameters x 28 bytes x 6 updates
    assert parts["adam"] == pytest.approx(117.6)


def test_own_rates_lift_the_floor_shape_by_shape():
    shapes = dict.fromkeys(floor.own_shapes(WORK), 100.0)
    same = floor.seconds(WORK, floor.Rates(100.0, 1e30, shapes), itemsize=4, parameters=7)
    assert same == pytest.approx(
        floor.seconds(WORK, floor.Rates(100.0, 1e30), itemsize=4, parameters=7)
    )
    # the reference's head, 6 x 4 times [10 4] transposed, at half the rate: 480 FLOPs take 9.6 s,
    # not 4.8
    slow = floor.seconds(
        WORK,
        floor.Rates(100.0, 1e30, shapes | {(6, 4, 10, True, 1): 50.0}),
        itemsize=4,
        parameters=7,
    )
    assert slow["reference"] - same["reference"] == pytest.approx(4.8)


def run(*arguments: str) -> subprocess.CompletedProcess:
    env = {
        name: x
        for name, x in os.environ.items()
        if name != "XLA_FLAGS" and not name.startswith("JAX_")
    }
    command = [sys.executable, str(BENCHMARKS / "step.py"), *arguments]
    return subprocess.run(
        command, env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_tiny_run_prints_a_row_and_keeps_it(tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    done = run(
        "--size",
        "tiny",
        "--steps",
        "1",
        "--dtype",
        "float32",
        "--threads",
        "all",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    assert any(text.split()[:3] == ["tiny", "float32", "all"] for text in done.stdout.splitlines())
    row = json.loads(out.read_text())
    assert row["system"] == "jaxppo" and len(row["steps_s"]) == 1
    assert row["tokens_per_s"] == pytest.approx(8 * 4 / row["step_s"])  # 8 rows of 4 new tokens
    assert row["times_floor"] == pytest.approx(row["step_s"] / sum(row["floor_parts_s"].values()))
    assert row["floor_s"] <= row["own_floor_s"]


def test_a_missing_peer_is_one_line_with_the_recipe(tmp_path):
    done = run(
        "--peer",
        "trl",
        "--peer-python",
        str(tmp_path / "python"),
        "--out",
        str(tmp_path / "rows.jsonl"),
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "trl==1.12.0" in done.stderr


def last_object(script: str, *options: str) -> dict:
    """The JSON object that a benchmark prints as its last line."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options, "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_ragged_prints_one_object_as_its_last_line():
    """16 rollouts of the fixed lengths, cut at 16, in two groups of 8 prompt tokens: 2 · 8 + 241
    tokens exist. Dense, 16 rows of 24.
    """
    found = last_object("ragged.py", "--size", "tiny", "--steps", "1")
    assert found["tokens"] == 2 * 8 + 241 and found["positions_dense"] == 16 * 24
    assert found["positions_packed"] <= found["positions_dense"]
    assert found["ratio"] == pytest.approx(found["packed_s"] / found["dense_s"])


@pytest.mark.ci
def test_episodes_inside_and_outside_the_program_are_the_same():
    """8 rows guess a number in up to 6 turns of up to 5 letters."""
    small = ["--size", "smoke", "--rows", "8", "--seeds", "2", "--steps", "1"]
    found = last_object("episodes.py", *small)
    assert found["same_episodes"] == 1 and 25 < found["length"] <= 30
    assert found["ratio"] == pytest.approx(found["host_s"] / found["program_s"])
    rate = found["program_seeds_episodes_per_s"]
    assert rate == pytest.approx(2 * 8 / found["program_seeds_s"])
