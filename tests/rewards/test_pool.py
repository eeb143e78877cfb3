import gc
import logging
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pebble
import pytest
import toys
from broken_judge import judge as broken
from judges import judge

from jaxppo.errors import UserError
from jaxppo.rewards.host import on_host
from jaxppo.rewards.pool import RewardPool


def children() -> set[int | None]:
    return {process.pid for process in multiprocessing.active_children()}


@pytest.fixture(scope="module")
def pool():
    # SIGKILL follows SIGTERM sooner than in 3 seconds
    with (
        pytest.MonkeyPatch.context() as patch,
        RewardPool(judge, workers=2, seconds=1.0, memory=2**29) as pool,
    ):
        patch.setattr(pebble.CONSTS, "term_timeout", 0.3)
        yield pool
    assert not children()


def test_scores_come_in_order(pool):
    prompts, responses = [str(i) for i in range(40)], ["a" * i for i in range(40)]
    assert pool(prompts, responses) == [len(str(i)) + i for i in range(40)]
    assert pool([], []) == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("loop", "no answer within 1.0 s"),
        ("sleep in C", "no answer within 1.0 s"),
        ("ignore", "no answer within 1.0 s"),
        ("allocate", "MemoryError"),
        ("exit", r"its process ended \(exit code 1\)"),
        ("raise", "RuntimeError: no idea"),
        ("string", "a reward must be a number, but is '1.0'"),
        ("huge", "a reward must be a number, but is 'xxx"),
        ("nan", "a reward must be finite, but is nan"),
    ],
)
def test_a_fault_costs_one_row(pool, fault, words, caplog, capfd):
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        scores = pool(["p"] * 5, ["a", "bb", fault, "cc", "d"])
    assert math.isnan(scores[2]) and [scores[i] for i in (0, 1, 3, 4)] == [2, 3, 3, 2]
    assert [
        record.getMessage().startswith("the reward of row 2 failed: ") for record in caplog.records
    ] == [True]
    assert re.search(words + ".*; the row is left out", caplog.records[0].getMessage())
    caplog.clear()
    assert pool(["p"], ["a"]) == [2.0]  # and the pool still works
    assert time.monotonic() - began < 8


def test_what_a_judge_prints_is_dropped(pool, capfd):
    assert pool(["p"], ["print"]) == [6.0]
    assert capfd.readouterr() == ("", "")


def test_workers_never_take_the_accelerator(pool):
    assert pool(["p"], ["platform"]) == [1.0]


def test_every_row_of_a_batch_may_fail(pool):
    assert all(math.isnan(x) for x in pool(["p"] * 4, ["exit", "raise", "exit", "nan"]))


def test_workers_are_recycled():
    with RewardPool(judge, workers=1, recycle=3) as pool:
        found = pool(["p"] * 7, ["pid"] * 7)
    assert [len(set(found[:3])), len(set(found[3:6])), len(set(found))] == [1, 1, 3]


def test_text_of_any_kind_arrives(pool):
    assert pool(["ä" * 3, "\ud800", "\x00"], ["🙂", "", "a" * 10**6]) == [4.0, 1.0, 10**6 + 1]


def test_a_judge_that_cannot_be_imported_is_refused():
    with pytest.raises(UserError, match="define it in a module"):
        RewardPool(lambda prompt, response: 0.0)
    pool, before = RewardPool(broken, workers=2), children()
    with pytest.raises(UserError, match="could not import the judge broken_judge.judge"):
        pool(["p"], ["r"])
    assert children() == before


def test_workers_that_die_while_idle_cost_no_row(pool):
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    assert pool(["p"] * 3, ["a", "bb", "cc"]) == [2.0, 3.0, 3.0]


def test_a_deleted_pool_leaves_no_process():
    before = children()
    pool = RewardPool(judge, workers=2)
    pool(["p"] * 2, ["r"] * 2)
    mine = children() - before
    assert len(mine) == 2
    del pool
    gc.collect()
    assert not mine & children()


def test_a_program_that_ends_leaves_no_process():
    """Although nobody closes the pool."""
    code = """
from judges import judge
from jaxppo.rewards.pool import RewardPool
if __name__ == "__main__":
    pool = RewardPool(judge, workers=1, seconds=0.5)
    print(int(pool(["p"], ["pid"])[0]), flush=True)
"""
    script = Path(__file__).parent / "judges.py"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_a_trivial_judge_costs_less_than_two_milliseconds_a_row(pool):
    """On a quiet machine it costs 0.1 ms."""
    pool(["p"] * 10, ["r"] * 10)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        pool(["p"] * 90, ["r"] * 90)
        best = min(best, time.perf_counter() - began)
    assert best / 90 < 2e-3 + 1 / 90  # a recycled worker starts in between


def test_in_the_compiled_program(pool, llama):
    """JAX calls it from its own thread; a row that fails is invalid."""
    rolled = toys.roll(llama, toys.prompts())
    decode = lambda rows: ["raise" if 3 in row else "a" * len(row) for row in rows]
    scores, valid = jax.device_get(jax.jit(on_host(pool, decode, batched=True))({}, rolled))
    bad = np.asarray(((rolled.response == 3) & (rolled.mask > 0)).any(1))
    assert 0 < bad.sum() < 8
    np.testing.assert_array_equal(valid, ~bad)
    assert (scores[~bad] > 0).all()
