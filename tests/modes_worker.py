"""Some cases of test_modes in the processes of a launcher; the first process writes what came out, for the test to compare."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

from jaxppo import processes

CASES = {  # name -> (settings, mode, mesh, options of `run`)
    "pmap sgd, 4 microbatches, remat": ("sgd", "pmap", "", {"changes": {"microbatches": 4}, "remat": "block"}),
    "mesh adam": ("adam", "mesh", "fsdp=2,tensor=2", {}),
    "host reward": ("sgd", "pmap", "", {"host": True, "steps": 2}),
}


def settings_of(name: str, changes: dict):
    import test_modes

    return replace({"adam": test_modes.SETTINGS, "sgd": test_modes.SGD}[name], **changes)


def outcome(name: str, *, reference: bool = False) -> dict[str, np.ndarray]:
    """Metrics of every step and the parameters at the end, flat; `reference` is the same on one device, in one part."""
    import jax
    import test_modes

    kind, mode, mesh, options = CASES[name]
    options = dict(options)
    settings = settings_of(kind, {} if reference else options.pop("changes", {}))
    options.pop("changes", None)
    reward = test_modes.host_reward() if options.pop("host", False) else None
    if reference:
        mode, mesh = "jit", ""
        options.pop("remat", None)
    state, rows = test_modes.run(settings, mode, mesh, reward=reward, **options)
    leaves = {f"params{jax.tree_util.keystr(path)}": x for path, x in jax.tree_util.tree_leaves_with_path(state.params)}
    metrics = {f"{number} {key}": x for number, row in enumerate(rows) for key, x in row.items()}
    return {key: np.asarray(x) for key, x in (leaves | metrics).items()}


def main(folder: Path) -> None:
    processes.connect("on", timeout=60, heartbeat=20)
    import test_modes  # noqa: F401  (it wants JAX's devices)

    for name in CASES:
        found = outcome(name)
        if processes.is_main():
            np.savez(folder / f"{name}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
