"""Compare eight seeds as one program with eight processes: wall and CPU seconds, and peak memory.

Question   What does `vmap` over seeds save, compilation included?
Method     The same eight PPO runs of a toy task (`jaxppo.ablation.toy_tasks`), in one process as
           one program, and in eight processes one after the other; first without any compiled
           program, then with a cache that holds it.
Command    python experiments/benchmarks/sweep.py
           # --width 128 --layers 3 --batch-size 64 for a larger network
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import ClassVar

from jaxppo import algorithms, cli
from jaxppo.ablation import sweep, toy_tasks


@dataclass(frozen=True)
class Bench:
    RANGES: ClassVar = {
        **dict.fromkeys(("seeds", "width", "layers"), "(0, inf)"),
        "of": "[0, 4294967295]",
    }

    seeds: int = 8
    steps: int = 80
    width: int = 32
    layers: int = 1
    batch_size: int = 64
    of: tuple[int, ...] = ()
    """seeds to run in this process; empty = start the processes and compare them"""
    traceback: bool = False


def run_seeds(options: Bench) -> None:
    """Run some seeds in this process, and print their cost as a line of JSON."""
    config = toy_tasks.ToyConfig(
        steps=options.steps,
        width=options.width,
        layers=options.layers,
        batch_size=options.batch_size,
        save_every=options.steps,
    )
    runs = [sweep.Run("", seed, {}, "prompt") for seed in options.of]
    parts = lambda settings: algorithms.make_parts(settings, toy_tasks.reward)
    results = sweep.run(
        config, runs, toy_tasks.load, parts, lambda run: toy_tasks.RandomPrompts(run.task)
    )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ends = [float(x.metrics["reward"][-8:].mean()) for x in results]
    print(
        json.dumps(
            {"cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss / 1024, "ends": ends}
        )
    )


def measure(options: Bench, groups: list[list[int]], cache: str) -> dict:
    """Run one process after the other, one for each group of seeds, with this cache; "" gives each
    an empty cache.
    """
    started, found = time.monotonic(), []
    names = ("steps", "width", "layers", "batch_size")
    settings = [
        word
        for name in names
        for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    for seeds in groups:
        with tempfile.TemporaryDirectory() as empty:
            environment = {
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": cache or empty,
                "JAX_PLATFORMS": "cpu",
            }
            command = [sys.executable, __file__, *settings, "--of", *map(str, seeds)]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        "wall": time.monotonic() - started,
        "cpu": sum(x["cpu"] for x in found),
        "memory": max(x["memory"] for x in found),
        "ends": [end for x in found for end in x["ends"]],
    }


def main(options: Bench) -> None:
    if options.of:
        return run_seeds(options)
    seeds = list(range(options.seeds))
    print(
        "| | wall, s | CPU, s | peak memory of a process, MB |\n| --- | --- | --- | --- |",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as many:
        measure(options, [seeds], one)  # fills the caches
        measure(options, [seeds[:1]], many)
        for kind, caches in (
            ("nothing compiled before", ("", "")),
            ("from a cache of programs", (one, many)),
        ):
            together = measure(options, [seeds], caches[0])
            apart = measure(options, [[seed] for seed in seeds], caches[1])
            for name, x in (("one program", together), (f"{options.seeds} processes", apart)):
                print(
                    f"| {name}, {kind} | {x['wall']:.0f} | {x['cpu']:.0f} | {x['memory']:.0f} |",
                    flush=True,
                )
            worst = max(abs(a - b) for a, b in zip(together["ends"], apart["ends"], strict=True))
            print(
                f"| ratio | {apart['wall'] / together['wall']:.1f} "
                f"| {apart['cpu'] / together['cpu']:.1f} | |"
            )
    print(f"the last rewards of the same seeds differ by at most {worst:.4f}")


if __name__ == "__main__":
    cli.script(main, Bench)
