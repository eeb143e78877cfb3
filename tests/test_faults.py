"""Faults, through the command line, in processes of their own: what is promised in tests/README.md,
one test each.

The measure of "nothing is lost" is a run that nobody disturbed: parameters, optimizer, key, cursor
and metrics to the last bit.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import TIMING_KEYS, environment

from jaxppo.launch import free_port
from jaxppo.run import checkpoint, manifest

pytestmark = pytest.mark.ci

TESTS = Path(__file__).parent
STEPS = 12


def start(folder: Path, *args: str, steps: int = STEPS, **env: str) -> subprocess.Popen:
    own = environment() | env
    command = [
        sys.executable,
        str(TESTS / "faulty.py"),
        "--runs",
        str(folder),
        "--steps",
        str(steps),
        "--parallel",
        "jit",
        *args,
    ]
    return subprocess.Popen(
        command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def run(folder: Path, *args: str, **options) -> tuple[int, str, str]:
    return finish(start(folder, *args, **options))


def wait_for(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run's metrics have a step."""
    path, deadline = folder / "a" / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rows(folder: Path) -> list[dict]:
    """The metrics, every line whole."""
    lines = (folder / "a" / "metrics.jsonl").read_text().splitlines()
    return [{k: x for k, x in json.loads(line).items() if k not in TIMING_KEYS} for line in lines]


def last_state(folder: Path, step: int = STEPS):
    """Every array of a step's checkpoint, by name; its manifest holds."""
    manifest.verify(folder / "a" / "checkpoints" / str(step))
    with checkpoint.checkpointer() as reader:
        tree = reader.restore(
            (folder / "a" / "checkpoints" / str(step) / "state").absolute(),
            args=ocp.args.StandardRestore(),
        )
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_run(folder: Path, undisturbed: Path, step: int = STEPS) -> None:
    got, want = last_state(folder, step), last_state(undisturbed, step)
    assert set(got) == set(want) and len(want) > 10
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert rows(folder) == rows(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out, err = run(folder)
    assert code == 0 and f"done: step {STEPS}" in out, err
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    return folder


# Killed


def killed_at_random(folder: Path, kills: int, seed: int, *, until: float) -> int:
    """Start, kill -9 at a random moment, resume, ... and let the last one end. Returns how many
    kills met a running process.
    """
    rng, struck = random.Random(seed), 0
    for number in range(kills):
        # A hair after some step: in the next one, in its save, between data and manifest.
        process = start(folder, *(["--resume"] if number else []), "--save-every", "1")
        done = len(rows(folder)) if number else 0
        wait_for(folder, min(done + 1, STEPS - 2), process)
        time.sleep(rng.uniform(0, until))
        struck += process.poll() is None
        process.kill()
        finish(process)
    code, out, err = run(folder, "--resume", "--save-every", "1")
    assert code == 0 and "done" in out, err
    return struck


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(undisturbed, tmp_path):
    assert killed_at_random(tmp_path, 5, seed=1, until=0.05) >= 3
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_killed_many_times(undisturbed, tmp_path, seed):
    assert killed_at_random(tmp_path, 5, seed=seed, until=0.2) >= 3
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(
    "where",
    ["manifest", *(pytest.param(part, marks=pytest.mark.slow) for part in ("data", "prune"))],
)
def test_killed_in_a_save(undisturbed, tmp_path, where):
    """In the middle of the data, between data and manifest, between manifest and the removal of
    older ones.
    """
    code, *_ = run(tmp_path, FAULTY_DIE=where, FAULTY_AT="6")
    assert code == -signal.SIGKILL
    folder = tmp_path / "a" / "checkpoints"
    sealed = [path.name for path in folder.iterdir() if (path / manifest.NAME).exists()]
    assert ("6" in sealed) == (where == "prune") and "4" in sealed
    code, _, err = run(tmp_path, "--resume")
    assert code == 0, err
    assert_same_run(tmp_path, undisturbed)
    assert all(path.name.isdigit() for path in folder.iterdir())  # nothing half written is left


@pytest.mark.slow
def test_killed_with_adapters_on_every_layer(tmp_path):
    """Between data and manifest of the first step's save; two steps in all. The base below them
    is in 8 bits.
    """
    own = ["--lora-on", "all", "--rslora", "--base-dtype", "int8", "--save-every", "1"]
    for folder, options in (("one", {}), ("two", {"FAULTY_DIE": "manifest", "FAULTY_AT": "1"})):
        code, _, err = run(tmp_path / folder, *own, steps=2, **options)
        assert code == (-signal.SIGKILL if options else 0), err
    code, _, err = run(tmp_path / "two", *own, "--resume", steps=2)
    assert code == 0, err
    assert_same_run(tmp_path / "two", tmp_path / "one", step=2)
    moved = {name for name, x in last_state(tmp_path / "one", 2).items() if x.any()}
    for layer in ("q", "k", "v", "o", "gate", "up", "down"):
        assert any(f"'{layer}']['lora_b']" in name for name in moved)


@pytest.mark.slow
def test_killed_before_the_first_step_can_be_resumed(undisturbed, tmp_path):
    process = start(tmp_path)
    path = tmp_path / "a" / "checkpoints" / "0" / manifest.NAME
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    finish(process)
    assert run(tmp_path, "--resume")[0] == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow  # test_train.py has it in one process
def test_killed_with_its_settings_written_and_nothing_else(undisturbed, tmp_path):
    """Before the first state was saved nothing is lost: with --resume it begins."""
    code, *_ = run(tmp_path, FAULTY_DIE="data", FAULTY_AT="0")
    assert code == -signal.SIGKILL and (tmp_path / "a" / "config.json").exists()
    code, out, err = run(tmp_path, "--resume")
    assert code == 0, err
    assert "the run ended before anything was saved: it starts from the beginning" in out
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow  # test_train.py has it in one process
def test_eight_devices_then_two_then_one(tmp_path):
    """The same samples (rewards and lengths hang on them) and parameters as on one device; within
    2e-5, not bit for bit.
    """
    wide = ["--batch-size", "16", "--parallel", "auto", "--lr", "1e-4"]
    code, _, err = run(tmp_path / "one", *wide)
    assert code == 0, err
    for devices, steps in ((8, 4), (2, 8), (1, 12)):
        more = ["--resume"] if devices < 8 else []
        code, out, err = run(
            tmp_path / "moved", *wide, *more, steps=steps, JAX_NUM_CPU_DEVICES=str(devices)
        )
        assert code == 0, err
        assert (f"pmap on {devices} devices" in out) == (devices > 1)
    got, want = last_state(tmp_path / "moved"), last_state(tmp_path / "one")
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=2e-5, err_msg=name)
    for moved, one in zip(rows(tmp_path / "moved"), rows(tmp_path / "one"), strict=True):
        assert moved["length"] == one["length"] and moved["reward"] == pytest.approx(
            one["reward"], abs=1e-6
        )


# Signals


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_75(undisturbed, tmp_path, number):
    process = start(tmp_path, "--slow", "0.05", "--save-every", "100", steps=STEPS)
    wait_for(tmp_path, 3, process)
    process.send_signal(number)
    code, out, err = finish(process)
    done = rows(tmp_path)[-1]["step"]
    assert code == 75, err
    assert f"error: stopped after step {done}, which is saved; continue with --resume" in err
    assert (tmp_path / "a" / "checkpoints" / str(done) / manifest.NAME).exists() and done < STEPS
    code, _, err = run(tmp_path, "--resume", "--slow", "0.05", "--save-every", "100")
    assert code == 0, err
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))


def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path):
    own = environment()
    names = ("JAXPPO_COORDINATOR", "JAXPPO_PROCESSES", "JAXPPO_PROCESS")

    address = f"localhost:{free_port()}"
    command = [
        sys.executable,
        str(TESTS / "faulty.py"),
        "--runs",
        str(tmp_path),
        "--steps",
        "100000",
        "--save-every",
        "100000",
    ]
    pair = [
        subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=own
            | dict(zip(names, (address, "2", str(number))))
            | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        )
        for number in range(2)
    ]
    wait_for(tmp_path, 3, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    (code0, _, err0), (code1, _, err1) = (finish(process, 60) for process in pair)
    done = rows(tmp_path)[-1]["step"]
    assert (code0, code1) == (75, 75), (err0, err1)
    for err in (err0, err1):
        assert f"stopped after step {done}, which is saved" in err
    last_state(tmp_path, done)


# Damage


@pytest.mark.parametrize(
    "seed", [pytest.param(0), *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 5))]
)
def test_a_flipped_bit_costs_the_steps_since_the_checkpoint_before(undisturbed, tmp_path, seed):
    shutil.copytree(undisturbed / "a", tmp_path / "a")
    rng = random.Random(seed)
    newest = tmp_path / "a" / "checkpoints" / str(STEPS)
    path = rng.choice(
        [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    )
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    code, _, err = run(tmp_path, "--resume")
    assert code == 0, err
    assert f"warning: the checkpoint of step {STEPS} is damaged: " in err
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow  # run/test_checkpoint.py has it in one process
def test_with_every_checkpoint_damaged_nothing_starts_again(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "a", tmp_path / "a")
    for path in (tmp_path / "a" / "checkpoints").rglob(manifest.NAME):
        path.write_text("{}")
    before = rows(tmp_path)
    code, _, err = run(tmp_path, "--resume")
    assert code == 2 and "no checkpoint of" in err and "Traceback" not in err
    assert rows(tmp_path) == before


@pytest.mark.slow  # test_train.py has it in one process
def test_two_writers(tmp_path):
    first = start(tmp_path, "--slow", "0.05", steps=1000)
    wait_for(tmp_path, 1, first)
    code, _, err = run(tmp_path, "--resume", "--slow", "0.05", steps=1000)
    assert code == 2 and f"belongs to process {first.pid} on " in err
    first.kill()
    finish(first)


@pytest.mark.slow
def test_a_folder_that_vanishes(tmp_path):
    process = start(tmp_path, "--slow", "0.02", "--save-every", "1", steps=1000)
    wait_for(tmp_path, 2, process)
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "gone")
    code, out, err = finish(process)
    assert code == 1, err  # the save in flight makes Orbax print tracebacks of its own
    assert "3 times in a row now" in err.splitlines()[-1]
    assert "warning: the checkpoint of step" in out  # told before, too


def test_a_full_disk(tmp_path):
    """4 MB: room for a few checkpoints of the small model, then none; what was good stays so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        process = start(
            disk, "--slow", "0.02", "--save-every", "1", "--keep-every", "1", steps=1000
        )
        code, _, err = finish(process)
        assert code == 1, err
        last = err.splitlines()[
            -1
        ]  # the third save that fails, or, with not a byte left, the line of metrics
        assert (
            "3 times in a row now; step " in last
            or "cannot write ([Errno 28] No space left" in last
        )
        assert "is safe" in last
        steps = sorted(int(path.name) for path in (disk / "a" / "checkpoints").iterdir())
        for step in steps:
            manifest.verify(disk / "a" / "checkpoints" / str(step))
        assert len(steps) > 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Numbers


@pytest.mark.parametrize(
    ("fault", "at"),
    [
        ("gradient", 5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("loss", 1),
                ("loss", 5),
                ("loss", 6),
                ("gradient", 1),
                ("gradient", 6),
                ("logits", 1),
                ("logits", 5),
                ("logits", 6),
                ("reward", 1),
                ("reward", 5),
                ("reward", 6),
            ]
        ),
    ],
)
def test_one_bad_step_changes_nothing_and_the_run_goes_on(tmp_path, fault, at):
    """At steps 1, k and k + 1 of k = 5 bad steps in a row that would end it."""
    code, _, err = run(
        tmp_path,
        "--fault",
        fault,
        "--at",
        str(at),
        "--save-every",
        "1",
        "--keep-every",
        "1",
        steps=8,
    )
    assert code == 0, err
    found = rows(tmp_path)
    assert [row["skipped"] > 0 or row["invalid_rows"] == 8 for row in found] == [
        step == at for step in range(1, 9)
    ]
    before, after = last_state(tmp_path, at - 1), last_state(tmp_path, at)
    moving = {name for name in before if not np.array_equal(before[name], after[name])}
    assert all(
        "params" not in name and "opt_state" not in name and "statistics" not in name
        for name in moving
    ), moving
    assert any("step" in name for name in moving) and any("cursor" in name for name in moving)


@pytest.mark.parametrize(
    "fault",
    ["loss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gradient", "logits"))],
)
def test_five_bad_steps_in_a_row_end_the_run_with_76(tmp_path, fault):
    bad = [str(step) for step in range(4, 9)]
    code, _, err = run(tmp_path, "--fault", fault, "--at", *bad, steps=20)
    assert code == 76
    assert (
        "error: no finite update in the 5 steps up to step 8; the newest checkpoint is good" in err
    )
    newest = max(int(path.name) for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert all(np.isfinite(x).all() for x in last_state(tmp_path, newest).values())


@pytest.mark.slow
def test_four_bad_steps_in_a_row_do_not(tmp_path):
    code, _, err = run(tmp_path, "--fault", "loss", "--at", "4", "5", "6", "7", steps=9)
    assert code == 0, err
    assert [row["barren_steps"] for row in rows(tmp_path)] == [0, 0, 0, 1, 2, 3, 4, 0, 0]


@pytest.mark.slow
def test_debug_nans_names_the_operation_and_the_step(tmp_path):
    """log(-1), in the eleventh step; the newest checkpoint is that of step 10."""
    code, _, err = run(tmp_path, "--fault", "loss", "--at", "11", "--debug-nans")
    assert code == 76
    assert "error: step 11: nan generated by primitive: log, at " in err and "faulty.py:" in err


@pytest.mark.slow
def test_rewards_that_are_none(tmp_path):
    """All rows of step 2 are invalid: more than the share that is allowed."""
    code, _, err = run(
        tmp_path, "--fault", "judge", "--at", "2", "--max-invalid-rewards", "0.1", steps=4
    )
    assert code == 2
    assert "100% of the rewards of step 2 are invalid (--max-invalid-rewards 10%)" in err
    assert "RuntimeError: poison; the row is left out" in err


# Settings


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch-size", "1073741824"], "GiB on each device, which has"),
        pytest.param(
            ["--batch-size", "9"],
            "--batch-size 9 does not divide into 2 minibatches; use --batch-size 10",
            marks=pytest.mark.slow,  # as --stepz: experiments/test_experiments.py
        ),
        pytest.param(["--stepz", "3"], "perhaps you meant --steps", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_run_is_refused_at_once(tmp_path, args, words):
    code, _, err = run(tmp_path, *args)
    assert code == 2 and words in err and "Traceback" not in err, err
    assert not (tmp_path / "a" / "config.json").exists()


@pytest.mark.slow  # test_train.py has it in one process
def test_another_configuration_is_another_run(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "a", tmp_path / "a")
    code, _, err = run(tmp_path, "--resume", "--lr", "0.5", "--seed", "3")
    assert code == 2
    assert (
        "error: --resume with other settings would make it another run: "
        "--lr 0.01 -> 0.5, --seed 0 -> 3" in err
    )


# Soak


def soak(folder: Path, seconds: float, seed: int) -> tuple[int, list[float]]:
    """Random signals and resumes for a while; then to the end. (how often it was started, its
    memory in MB each time).
    """
    rng, until, starts, memory = random.Random(seed), time.monotonic() + seconds, 0, []
    total = 200
    while time.monotonic() < until or starts < 3:  # a busy machine starts slowly
        begun = (folder / "a" / "config.json").exists()
        process = start(folder, *(["--resume"] if begun else []), "--slow", "0.02", steps=total)
        starts += 1
        time.sleep(rng.uniform(4, 12))
        if process.poll() is None:
            path = Path(f"/proc/{process.pid}/status")
            memory += [
                int(line.split()[1]) / 1024
                for line in path.read_text().splitlines()
                if line.startswith("VmRSS")
            ]
            process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL]))
        code, _, err = finish(process)
        assert code in (0, 75, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130), err
    code, _, err = run(folder, "--resume", "--slow", "0.02", steps=total)
    assert code == 0, err
    return starts, memory


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [20.0, 1800.0])
def test_soak(tmp_path, seconds):
    """The end is that of a run nobody disturbed, and memory does not grow from start to start."""
    starts, memory = soak(tmp_path / "soaked", seconds, seed=0)
    code, _, err = run(tmp_path / "calm", "--slow", "0.02", steps=200)
    assert code == 0, err
    assert starts >= 3
    assert_same_run(tmp_path / "soaked", tmp_path / "calm", 200)
    late, early = memory[len(memory) // 2 :], memory[: len(memory) // 2]
    assert max(late, default=0) < 1.5 * max(early, default=1) + 200
