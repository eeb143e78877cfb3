"""Some cases of test_modes in the processes of a launcher; the first process writes what came out,
for the test to compare.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

from jaxppo import ppo, pretrained
from jaxppo.data.prompts import encode
from jaxppo.parallel import processes, sharding
from jaxppo.run import load, sampler
from jaxppo.run.checkpoint import Checkpoints

CASES = {  # name -> (settings, mode, mesh, options of `run`)
    "pmap sgd, host reward, 4 microbatches, remat": (
        "sgd",
        "pmap",
        "",
        {"changes": {"microbatches": 4}, "remat": "block", "host": True},
    ),
    "mesh adam": ("adam", "mesh", "fsdp=2,tensor=2", {}),
    "packed groups": ("grpo", "mesh", "data=2,fsdp=2", {"uneven": True, "steps": 2}),
    "episodes": ("episodes", "pmap", "", {}),
}


def settings_of(name: str, changes: dict):
    import test_episode_modes
    import test_modes

    known = test_modes.OPTIMIZERS | test_modes.PACKED
    return replace((known | {"episodes": test_episode_modes.SETTINGS["grpo"]})[name], **changes)


def outcome(name: str, *, reference: bool = False) -> dict[str, np.ndarray]:
    """Metrics of every step and the parameters at the end, flat; `reference` is the same on one
    device, in one part.
    """
    import jax
    import test_episode_modes
    import test_modes

    kind, mode, mesh, options = CASES[name]
    options = dict(options)
    settings = settings_of(kind, {} if reference else options.pop("changes", {}))
    options.pop("changes", None)
    if options.pop("host", False):
        options["reward"] = test_modes.host_reward()
    if options.pop("uneven", False):
        options["batches"] = lambda number: test_modes.uneven(number, settings)
    if reference:
        mode, mesh = "jit", ""
        options.pop("remat", None)
    if kind == "episodes":
        options |= test_episode_modes.options(settings)
    state, rows = test_modes.run(settings, mode, mesh, **options)
    leaves = {
        f"params{jax.tree_util.keystr(path)}": x
        for path, x in jax.tree_util.tree_leaves_with_path(processes.to_host(state.params))
    }
    metrics = {f"{number} {key}": x for number, row in enumerate(rows) for key, x in row.items()}
    return {key: np.asarray(x) for key, x in (leaves | metrics).items()}


def outside(folder: Path, mesh: str = "") -> dict[str, np.ndarray]:
    """What programs other than the step do with a policy over a mesh of several processes, or on
    one device without a mesh: samples, a checkpoint and its restored arrays, a checkpoint of the
    language model.
    """
    import jax
    from runs import RUN, TEXTS

    config = replace(RUN, lora=0, value_init="normal")
    config, policy = load.load_policy(config, mesh=sharding.make_mesh(mesh) if mesh else None)
    placed = lambda state: sharding.place(state, sharding.make_mesh(mesh)) if mesh else state
    begin = lambda: placed(ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0)))
    state = begin()
    prompts = encode(TEXTS[:4], policy.tokenizer, config.prompt_length, too_long="last")
    drawn = sampler.Sampler(config, policy, rows=4)(state, prompts, seed=3)
    checkpoints = Checkpoints(folder / "checkpoints", write=processes.is_main())
    checkpoints.save(state, score=1.0)
    checkpoints.wait()
    processes.wait_for_all("saved")
    again = Checkpoints(folder / "checkpoints", write=False).restore(begin())
    if mesh:
        assert jax.tree.map(lambda x: x.sharding, again.params) == jax.tree.map(
            lambda x: x.sharding, state.params
        )
        kernel = again.params["layers_0"]["attention"]["q"]["kernel"]
        assert not kernel.is_fully_addressable and not kernel.is_fully_replicated
    place = load.save_model(config, policy, again, folder / "run" / "model")
    flat = lambda name, tree: {
        f"{name}{jax.tree_util.keystr(k)}": x for k, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    found = flat("params", jax.device_get(processes.to_host(again.params))) | flat(
        "kept", pretrained.load(str(place)).params
    )
    tokens = {f"tokens {i}": np.asarray(sample.tokens) for i, sample in enumerate(drawn)}
    found["key"] = np.asarray(jax.random.key_data(processes.to_host(again.key)))
    return found | tokens | {"kl": np.asarray([sample.kl for sample in drawn], np.float32)}


def main(folder: Path) -> None:
    processes.connect("on", timeout=60, heartbeat=20)
    import test_modes  # noqa: F401  (it wants JAX's devices)

    for name in CASES:
        found = outcome(name)
        if processes.is_main():
            np.savez(folder / f"{name}.npz", **found)
    found = outside(folder / "outside", "fsdp=2,tensor=2")
    if processes.is_main():
        np.savez(folder / "outside.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
