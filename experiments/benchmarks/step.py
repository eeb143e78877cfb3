"""Time one PPO step, and compare it with what the machine allows and with TRL.

Question   Seconds, tokens/s, compile time and peak memory of one step; its ratio to the arithmetic
           floor (`floor.py`) and to TRL's PPO.
Work       A random GPT-2 shape, prompt 16, responses of fixed length, 4 epochs x 4 minibatches (16
           Adam updates of all weights), value head, frozen reference, reward = count of one token.
             S   4 layers, width 256, 4 heads, vocabulary 8,192 (5 M), 64 rollouts of 32 or 128
                 tokens
             M  12 layers, width 768, 12 heads, vocabulary 50,257 (124 M), 16 rollouts of 32 tokens
Command    python experiments/benchmarks/step.py              # all sizes, types and thread counts
           python experiments/benchmarks/step.py --compile    # also compile times from a warm cache
           python experiments/benchmarks/step.py --peer trl --threads all
           # alternates with TRL 1.12's PPO trainer
Minutes    About 10; with --compile 15; --peer trl 25 (2 CPU cores). The machine must be quiet: the
           load is printed and recorded.
Columns    step: median seconds of the whole step, which is one XLA program. rollout, update: the
           same work compiled as two programs; they need not add up to the step. x floor: step over
           the floor at the highest rate of any product measured in the same process. x own shapes:
           step over the floor at the rates measured for the step's own products.

Each measurement runs in its own process, one at a time, and TRL's under the same conditions.
Environment variables, such as the allocator's, reach both. To make TRL's virtual environment:

    python3 -m venv ~/.cache/jaxppo/trl-venv
    ~/.cache/jaxppo/trl-venv/bin/pip install torch==2.13.0
    ~/.cache/jaxppo/trl-venv/bin/pip install trl==1.12.0 "transformers>=5" accelerate datasets
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import floor

from jaxppo import cli
from jaxppo.errors import UserError

HERE = Path(__file__).parent
LINUX = hasattr(os, "sched_getaffinity")
BOTH = ("float32", "bfloat16")
COLUMNS = (
    "size",
    "type",
    "threads",
    "step s",
    "rollout s",
    "update s",
    "tok/s",
    "compile s",
    "warm s",
    "peak GB",
    "floor s",
)
HEADER = "".join(f"{name:>10}" for name in COLUMNS) + f"{'x floor':>10}{'x own shapes':>14}"


@dataclass(frozen=True)
class Options:
    RANGES: ClassVar = {"turns": "(0, inf)"}

    size: tuple[Literal["S/32", "S/128", "M/32", "tiny"], ...] = ("S/32", "S/128", "M/32")
    """which shapes; tiny is a smoke test"""
    dtype: Literal["float32", "bfloat16", "both"] = "both"
    threads: Literal["1", "all", "both"] = "both"
    """1: each process runs on one core"""
    steps: int = 5
    """steps timed in each process, after one of warm-up"""
    compile: bool = False
    """also measure compiling from a warm persistent cache, in a second process"""
    peer: Literal["none", "trl"] = "none"
    """also run TRL's PPO trainer on the same work"""
    turns: int = 2
    """with a peer: how often each of the two runs"""
    peer_python: Path = Path("~/.cache/jaxppo/trl-venv/bin/python")
    """the python of the peer's virtual environment"""
    out: Path = Path("runs/benchmark.jsonl")
    """one JSON object is appended for each row"""


def main(options: Options) -> None:
    if options.steps <= 0 or options.turns <= 0:
        raise UserError(f"--steps {options.steps} and --turns {options.turns} must be above 0")
    if options.threads != "all" and not LINUX:
        raise UserError(
            f"--threads {options.threads} needs Linux, which can hold a process on one core; "
            "use --threads all"
        )
    if options.peer == "trl":
        check_peer(options.peer_python)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    load = f"load {os.getloadavg()[0]:.1f} (below 0.5 is quiet)"
    print(f"{cpu_name()}, {cores()} cores, {load}\n{HEADER}", flush=True)
    for threads in ("1", "all") if options.threads == "both" else (options.threads,):
        for size in options.size:
            for dtype in BOTH if options.dtype == "both" else (options.dtype,):
                measure(options, {"size": size, "dtype": dtype, "threads": threads})


def check_peer(python: Path) -> None:
    """Raise UserError if the peer's virtual environment is missing."""
    if not python.expanduser().exists():
        recipe = "; ".join(text.strip() for text in (__doc__ or "").splitlines()[-3:])
        raise UserError(f"no TRL at {python}; give --peer-python, or make it: {recipe}")


def measure(options: Options, row: dict) -> None:
    """Measure one row in our process (alternating with the peer's), print it and append it to the
    file.
    """
    row |= {
        "load": os.getloadavg()[0],
        "cpu": cpu_name(),
        "cores": cores(),
        "time": int(time.time()),
        "environment": settings(),
    }
    ours = measure_ours(options, row, parts=True)
    ours |= summary(row, ours)
    append(options.out, row | {"system": "jaxppo"} | ours)
    print(f"{line(row, ours)}\n{explain(row, ours)}", flush=True)
    if options.peer == "none":
        return
    our_steps, peer_steps = list(ours["steps_s"]), []
    for turn in range(options.turns):
        if turn:
            our_steps += measure_ours(options, row, parts=False)["steps_s"]
        peer = measure_trl(options, row)
        peer_steps += peer["steps_s"]
    peer |= {
        "steps_s": peer_steps,
        "step_s": statistics.median(peer_steps),
        "our_step_s": statistics.median(our_steps),
    }
    peer["ratio"] = peer["step_s"] / peer["our_step_s"]
    append(options.out, row | {"system": "trl"} | peer)
    print(versus(row, peer), flush=True)


def measure_ours(options: Options, row: dict, *, parts: bool) -> dict:
    """Measure our step in a new process. With `--compile` two more processes compile it: the first
    fills a compile cache, the second uses it.
    """
    spec = {**row, "steps": options.steps, "parts": parts, "compile_only": False}
    paths = {
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    }
    out = run_child(sys.executable, "own_step.py", spec, row, paths)
    if not parts or not options.compile:
        return out
    with tempfile.TemporaryDirectory() as cache:
        extra = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for _ in range(2):
            again = run_child(
                sys.executable, "own_step.py", spec | {"compile_only": True}, row, paths | extra
            )
    return out | {"warm_trace_s": again["trace_s"], "warm_compile_s": again["compile_s"]}


def measure_trl(options: Options, row: dict) -> dict:
    spec = {"work": dataclasses.asdict(floor.WORKS[row["size"]]), "steps": options.steps}
    precision = "bf16" if row["dtype"] == "bfloat16" else "no"
    extra = {
        "ACCELERATE_MIXED_PRECISION": precision,
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return run_child(str(options.peer_python.expanduser()), "trl_step.py", spec, row, extra)


def run_child(python: str, script: str, spec: dict, row: dict, extra: dict[str, str]) -> dict:
    """The JSON that `script` prints as its last line."""
    # The user's compile cache would hide the cost of compiling.
    env = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["TF_CPP_MIN_LOG_LEVEL"] = "2"
    # Set in the child before its first thread starts, so that every thread pool sees one core.
    one_core = lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    hold = one_core if row["threads"] == "1" else None
    command = [python, str(HERE / script), json.dumps(spec)]
    done = subprocess.run(
        command, env=env | extra, preexec_fn=hold, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise UserError(
            f"{script} failed with exit code {done.returncode} on {row['size']} {row['dtype']}; "
            "its messages are above"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(row: dict, ours: dict) -> dict:
    """Numbers derived from the measured ones."""
    step, work = statistics.median(ours["steps_s"]), floor.WORKS[row["size"]]
    low, own = sum(ours["floor_parts_s"].values()), sum(ours["own_floor_parts_s"].values())
    return {
        "step_s": step,
        "tokens_per_s": work.new_tokens / step,
        "floor_s": low,
        "times_floor": step / low,
        "own_floor_s": own,
        "times_own_floor": step / own,
        "gflop": floor.gflop(work),
    }


def line(row: dict, x: dict) -> str:
    warm = f"{x['warm_trace_s'] + x['warm_compile_s']:.1f}" if "warm_trace_s" in x else "-"
    seconds = [f"{x[name]:.3g}" for name in ("step_s", "rollout_s", "update_s")]
    memory, low = f"{x['peak_gb']:.2f}", f"{x['floor_s']:.3g}"
    cells = [row["size"], row["dtype"], row["threads"], *seconds, f"{x['tokens_per_s']:.0f}"]
    cells += [f"{x['trace_s'] + x['compile_s']:.1f}", warm, memory, low, f"{x['times_floor']:.2f}"]
    return "".join(f"{cell:>10}" for cell in cells) + f"{x['times_own_floor']:>14.2f}"


def explain(row: dict, x: dict) -> str:
    """How the floor is computed, as text."""
    parts, work = x["floor_parts_s"], floor.WORKS[row["size"]]
    counted = ", ".join(f"{name} {value:.4g}" for name, value in x["gflop"].items())
    spent = " + ".join(f"{name} {value:.3g}" for name, value in parts.items())
    adam = floor.ADAM_BYTES * x["parameters"] * work.updates / 1e9
    return (
        f"          GFLOP: {counted}; Adam {adam:.3g} GB; best product {x['gemm_gflops']:.0f} "
        f"GFLOP/s, memory {x['memory_gb_s']:.0f} GB/s\n"
        f"          floor: {spent} = {x['floor_s']:.3g} s; at the rates of its own shapes "
        f"{x['own_floor_s']:.3g} s; {x['cpu_s']:.3g} processor seconds a step"
    )


def versus(row: dict, peer: dict) -> str:
    work = floor.WORKS[row["size"]]
    least = sum(floor.gflop(work).values())
    return (
        f"          trl {peer['trl']} (torch {peer['torch']}, mixed precision "
        f"{peer['precision']}): {peer['step_s']:.3g} s, {peer['peak_gb']:.2f} GB; ours, "
        f"alternating with it, {peer['our_step_s']:.3g} s: {peer['ratio']:.2f} x\n"
        "          of which less work: with its separate value model and full logits TRL has "
        f"{floor.peer_gflop(work):.4g} GFLOP to our {least:.4g}: "
        f"{floor.peer_gflop(work) / least:.2f} x"
    )


def append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def settings() -> dict[str, str]:
    """The environment variables that can change a measurement."""
    known = ("XLA_FLAGS", "GLIBC_TUNABLES", "LD_PRELOAD")
    return {
        k: v
        for k, v in os.environ.items()
        if k in known or k.startswith(("JAX_", "MALLOC_", "OMP_", "MKL_"))
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if LINUX else os.cpu_count() or 1


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    cli.script(main, Options)
