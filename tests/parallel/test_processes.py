"""Several processes on this machine, as those of a pod: the same numbers as one device, and clear
ends when one is missing.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import modes_worker
import numpy as np
import pytest
from runs import environment, two_prompts

from jaxppo import launch
from jaxppo.errors import UserError
from jaxppo.parallel import processes, sharding

pytestmark = pytest.mark.ci

TESTS = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).parent / "jaxppo"  # with the verb `train`


def run_together(
    number: int, script: Path, *args: str, devices: int = 1, timeout: float = 400
) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "jaxppo.launch",
        "--processes",
        str(number),
        "--devices",
        str(devices),
        str(script),
        *args,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=timeout
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Two processes of two devices each have run every case."""
    folder = tmp_path_factory.mktemp("together")
    done = run_together(2, TESTS / "modes_worker.py", str(folder), devices=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", modes_worker.CASES)
def test_two_processes_of_two_devices_equal_one_device(together, name):
    want = modes_worker.outcome(name, reference=True)
    with np.load(together / f"{name}.npz") as got:
        assert set(got) == set(want)
        for key in want:
            tolerance = {"atol": 2e-5, "rtol": 0 if key.startswith("params") else 2e-4}
            np.testing.assert_allclose(got[key], want[key], **tolerance, err_msg=key)


def test_what_is_done_with_a_policy_that_no_process_has_whole(together, tmp_path):
    """Loaded over a mesh of both processes' devices, sampled from, saved, restored, kept as a
    checkpoint.
    """
    want = modes_worker.outside(tmp_path)
    with np.load(together / "outside.npz") as got:
        assert set(got) == set(want)
        for key in want:
            np.testing.assert_allclose(got[key], want[key], atol=2e-5, rtol=0, err_msg=key)


def options(folder: Path, *more: str) -> list[str]:
    data = two_prompts(folder)
    small = [
        "--tiny",
        "--batch-size",
        "8",
        "--minibatches",
        "2",
        "--response-length",
        "4",
        "--dtype",
        "float32",
    ]
    reward = ["--reward", f"{TESTS / 'runs.py'}:short_words"]
    return [*small, *reward, "--data", str(data), "--runs", str(folder), "--name", "a", *more]


def test_the_first_process_alone_prints_and_writes(tmp_path):
    done = run_together(
        2, SCRIPT, "train", *options(tmp_path, "--steps", "2", "--expect-devices", "2")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[:3] == [
        "2 processes, 2 devices",
        f"new run: {tmp_path / 'a'}",
        "--parallel auto: pmap on 2 devices",
    ]
    assert done.stdout.count("step 2/2") == 1
    assert "taking over" not in done.stderr and "belongs to" not in done.stderr
    rows = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == ["0", "2"]


@pytest.mark.slow
def test_two_processes_go_on_where_they_were(tmp_path):
    done = run_together(
        2, SCRIPT, "train", *options(tmp_path, "--steps", "2", "--expect-devices", "2")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    more = run_together(2, SCRIPT, "train", *options(tmp_path, "--steps", "3", "--resume"))
    assert more.returncode == 0, more.stderr[-3000:]
    assert "changed since the run began: --expect-devices 2 -> 0, --steps 2 -> 3" in more.stdout
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_the_main_job_over_a_mesh_of_two_processes(tmp_path):
    """Measured before, in between and at the end, stopped and gone on with: the numbers of one
    process with as many devices.
    """
    script = TESTS.parent / "experiments" / "sentiment.py"
    small = [
        "--tiny",
        "--dtype",
        "float32",
        "--eval-every",
        "1",
        "--lora",
        "0",
        "--value-init",
        "normal",
        "--minibatches",
        "2",
    ]
    small += ["--mesh", "fsdp=2,tensor=2", "--runs", str(tmp_path)]
    for name, count, devices in (("two", 2, 2), ("one", 1, 4)):
        done = run_together(count, script, *small, "--name", name, "--steps", "1", devices=devices)
        assert done.returncode == 0, done.stderr[-3000:]
        more = run_together(
            count, script, *small, "--name", name, "--steps", "2", "--resume", devices=devices
        )
        assert more.returncode == 0, more.stderr[-3000:]
    two, one = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one")
    )
    lines = lambda name: map(
        json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    )
    validated = lambda name: [
        {key: x for key, x in row.items() if "validation" in key} for row in lines(name)
    ]
    assert validated("two") == [pytest.approx(row, abs=1e-4) for row in validated("one")]
    assert [len(row) > 2 for row in validated("one")] == [True, True]
    numbers = lambda result: {
        name: x for name, x in result.items() if isinstance(x, float) and name != "minutes"
    }
    assert numbers(two) == pytest.approx(numbers(one), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "mesh"])
def test_a_late_process_is_waited_for(mode):
    """40 s late, once to a block of the first process and once to the first step; XLA's own
    collectives give up after 30.
    """
    done = run_together(2, TESTS / "late_worker.py", mode)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sum 3.0 steps 2.0 traces 1" in done.stdout


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--expect-devices", "4"], "--expect-devices 4, but there are 2"),
        (["--parallel", "jit"], "--parallel jit is for one process"),
    ],
)
def test_what_does_not_fit_ends_all_with_2(tmp_path, more, words):
    done = run_together(
        2, SCRIPT, "train", *options(tmp_path, "--steps", "1", "--heartbeat", "10", *more)
    )
    assert done.returncode == 2
    assert f"error: {words}" in done.stderr


def member(
    number: int, of: int, port: int, *args: str, devices: int = 1, host: str = "localhost"
) -> subprocess.Popen:
    """One process, started by hand."""
    own = dict(zip(processes.LAUNCHER, (f"{host}:{port}", str(of), str(number)), strict=True))
    env = environment(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(devices), **own)
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "train", *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_missing_process(tmp_path):
    """Neither the one that waits for the other nor the one that has a wrong address hangs."""
    began = time.monotonic()
    late = ["--connect-timeout", "5", "--heartbeat", "10"]
    alone = member(0, 2, launch.free_port(), *options(tmp_path, "--steps", "1", *late))
    lost = member(
        1, 2, launch.free_port(), *options(tmp_path, "--steps", "1", *late)
    )  # nobody listens there
    for process in (alone, lost):
        text, _ = process.communicate(timeout=100)
        assert process.returncode not in (0, 2), text
        assert "did not find each other" in text or "DEADLINE_EXCEEDED" in text
    assert time.monotonic() - began < 60
    assert not (tmp_path / "a").exists()


def test_unequal_numbers_of_devices(tmp_path):
    port = launch.free_port()
    waiting = ["--connect-timeout", "30", "--heartbeat", "10"]
    pair = [
        member(i, 2, port, *options(tmp_path, "--steps", "1", *waiting), devices=1 + i)
        for i in range(2)
    ]
    texts = [process.communicate(timeout=100)[0] for process in pair]
    assert all(process.returncode for process in pair)
    assert any(
        "every process needs the same number of devices, but here are process 0: 1, process 1: 2"
        in text
        for text in texts
    )


def test_a_killed_process_ends_the_other(tmp_path):
    port = launch.free_port()
    pair = [
        member(i, 2, port, *options(tmp_path, "--steps", "100000", "--heartbeat", "10"))
        for i in range(2)
    ]
    metrics = tmp_path / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline and pair[0].poll() is None
        time.sleep(0.1)
    pair[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    pair[0].communicate(timeout=60)
    pair[1].communicate(timeout=60)
    assert pair[0].returncode != 0
    assert time.monotonic() - began < 30  # the heartbeat is 10 s


# In one process


def test_one_process_connects_to_nothing(monkeypatch):
    for name in processes.LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    processes.connect("off")
    processes.connect("auto")
    assert processes.is_main() and processes.broadcast_int(7) == 7
    with processes.main_first("nothing to wait for"):
        pass
    with pytest.raises(UserError, match="--distributed 'maybe': choose one of auto, on, off"):
        processes.connect("maybe")


def test_what_one_process_has_is_here_already():
    tree = {
        "cut": sharding.place({"q": {"kernel": jnp.ones((8, 8))}}, sharding.make_mesh("fsdp=8")),
        "number": 3,
        "host": np.ones(2),
    }
    for got, want in zip(
        jax.tree.leaves(processes.to_host(tree)), jax.tree.leaves(tree), strict=True
    ):
        assert got is want


def test_on_fails_where_there_is_no_cluster():
    """In a process of its own: once JAX has started it cannot be asked."""
    code = "from jaxppo.parallel import processes; processes.connect('on', timeout=5)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 1 and "UserError: --distributed on: no cluster found" in done.stderr


def test_a_cluster_of_one_is_none(monkeypatch):
    """SLURM as JAX sees it: inside of srun, with several tasks."""
    names = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "a",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    for tasks in (1, 2):
        monkeypatch.setenv("SLURM_NTASKS", str(tasks))
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(tasks))
        assert processes.in_cluster() == (tasks > 1)
