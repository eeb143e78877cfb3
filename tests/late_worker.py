"""The second process comes late to what all do together for the first time; then both add up their
numbers.
"""

import sys
import time

from jaxppo import parallel
from jaxppo.parallel import processes

LATE = 40  # seconds; XLA's collectives on CPU give up after 30


def main(mode: str) -> None:
    processes.connect("on", timeout=60, heartbeat=20)
    import jax
    import jax.numpy as jnp
    from flax import struct

    @struct.dataclass
    class State:  # as much of a TrainState as a step wants
        count: jax.Array
        frozen: None = None

    with processes.main_first("reward"):
        if processes.is_main():
            time.sleep(LATE)

    def make(axis_name):
        def train_step(state, prompts):
            if not processes.is_main():
                time.sleep(LATE)  # while it is traced: a slow compiler
            total = prompts.sum()
            return state.replace(count=state.count + 1), {
                "sum": jax.lax.psum(total, axis_name) if axis_name else total
            }

        return train_step

    step = parallel.compile_for_mode(make, mode=mode, mesh="data=2" if mode == "mesh" else "")
    state = step.place(State(jnp.zeros(())))
    own = [float(jax.process_index() + 1)] if mode == "pmap" else [1.0, 2.0]
    prompts = jnp.asarray(own) if mode == "pmap" else step.put(jnp.asarray(own))
    for _ in range(2):
        state, metrics = step(state, prompts)
    print(
        "sum",
        float(metrics["sum"]),
        "steps",
        float(step.unreplicate(state).count),
        "traces",
        step.traces,
    )


if __name__ == "__main__":
    main(sys.argv[1])
