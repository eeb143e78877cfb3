"""Run on several processes: connect, wait, and exchange values.

Every process runs the same script on its own devices, and calls every program: over a
mesh, parameters are spread over the devices of all processes, and one process alone
could not read them (`to_host`). Only process 0 writes files and prints; what the others
need from it is made inside `main_first`. If one process dies, all end; start all of
them again with --resume.
"""

import contextlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from jaxppo.errors import RunError, UserError, first_line

MODES = ("auto", "on", "off")
# Seconds to wait for the slowest process, which compiles a large model or trains a
# reward model. The heartbeat notices a dead one sooner.
WAIT = 3600
# a barrier's name can be used once; all processes count alike
BARRIERS = itertools.count()
# set by `python -m jaxppo.launch`
LAUNCHER = ("JAXPPO_COORDINATOR", "JAXPPO_PROCESSES", "JAXPPO_PROCESS")


def connect(mode: str = "auto", *, timeout: int = 300, heartbeat: int = 60) -> None:
    """Join the other processes, before JAX is used for anything else.

    auto joins if the environment names a cluster of several processes (`jaxppo.launch`,
    or Cloud TPU, SLURM, GKE and Open MPI, as JAX detects them); on joins or fails; off
    does nothing.

    Args:
      timeout: seconds to wait for all processes.
      heartbeat: seconds without a sign of life after which a process counts as dead.

    Raises:
      UserError: an unknown mode, no cluster with on, or different numbers of devices.
      RunError: the others cannot be reached.
    """
    if mode not in MODES:
        raise UserError(f"--distributed {mode!r}: choose one of {', '.join(MODES)}")
    own = launcher_arguments()
    if mode == "off" or (mode == "auto" and not own and not in_cluster()):
        return
    # On CPU, each of XLA's collectives blocks a thread of its pool. With as many
    # threads as cores, two collectives over different axes can deadlock. NPROC sets the
    # number.
    os.environ.setdefault("NPROC", str((os.cpu_count() or 1) + 32))
    try:
        jax.distributed.initialize(
            **own, initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat
        )
    except ValueError as error:  # nothing says where the others are
        raise UserError(
            f"--distributed {mode}: no cluster found ({first_line(error)}); start the processes "
            "with srun, on a TPU pod, or with python -m jaxppo.launch"
        ) from error
    except RuntimeError as error:
        where = own.get("coordinator_address", "the cluster's coordinator")
        raise RunError(
            f"the processes did not find each other at {where} within {timeout} s "
            f"({first_line(error)})"
        ) from error
    shares = Counter(device.process_index for device in jax.devices())
    if len(set(shares.values())) > 1:
        counts = ", ".join(f"process {i}: {n}" for i, n in sorted(shares.items()))
        raise UserError(f"every process needs the same number of devices, but here are {counts}")
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    print(f"{jax.process_count()} processes, {jax.device_count()} devices")


def launcher_arguments() -> dict[str, Any]:
    """The launcher's arguments for `jax.distributed.initialize`; {} if it did not start
    this process.
    """
    found = [os.environ.get(name) for name in LAUNCHER]
    if None in found:
        return {}
    address, count, number = found
    return {
        "coordinator_address": address,
        "num_processes": int(count or 0),
        "process_id": int(number or 0),
    }


def in_cluster() -> bool:
    """Whether JAX detects a cluster with more than one process."""
    # there is no public function for this
    from jax._src.clusters import ClusterEnv

    kinds = (
        kind
        for kind in ClusterEnv._cluster_types
        if not kind.opt_in_only_method and kind.is_env_present()
    )
    return any(kind.get_process_count() > 1 for kind in kinds)


def is_main() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Let process 0 run the block before the others do.

    If it fails there, the heartbeat ends the others. `name` is the same on all.
    """
    if not is_main():
        wait_for_all(name)
    yield
    if is_main():
        wait_for_all(name)


def wait_for_all(name: str) -> None:
    """Wait until all processes are here.

    This is not a collective: on CPU, those fail if a process first joins one more than
    30 s late.
    """
    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))
        multihost.sync_global_processes(
            f"{name} {next(BARRIERS)}", timeout=WAIT, processes=everyone
        )


def broadcast_int(value: int) -> int:
    """Give process 0's value to all."""
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def broadcast_floats(values: Sequence[float]) -> list[float]:
    """Give process 0's values to all, in float32."""
    if jax.process_count() == 1:
        return list(values)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(values, np.float32))).tolist()


def to_host(tree: Any) -> Any:
    """Make every array readable by this process: gather those that are spread over
    processes into NumPy arrays, one at a time. All processes call it together.
    """

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                one(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)
