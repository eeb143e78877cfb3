"""Several processes, one run: how they find each other, who writes, and how they leave.

Every process runs the same script on its own devices, and calls every program: over a
mesh, parameters lie on the devices of all, and one process alone could not even read
them (`here`). Process 0 alone writes files and prints; what must be there before the
others go on (a run's folder, a trained reward model) is made inside `first`. JAX's own
runtime starts them and ends all when one dies, so the cure for a lost process is always
the same: start all of them again with --resume.
"""

import contextlib
import functools
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from jaxppo.errors import RunError, UserError, first_line

MODES = ("auto", "on", "off")
# seconds for the slowest process: it compiles a large model or trains a reward model; a
# dead one is noticed sooner
WAIT = 3600
# a barrier's name may be used once; all processes count alike
BARRIERS = itertools.count()

LAUNCHER = (
    "JAXPPO_COORDINATOR",
    "JAXPPO_PROCESSES",
    "JAXPPO_PROCESS",
)  # set by `python -m jaxppo.launch`


def connect(mode: str = "auto", *, timeout: int = 300, heartbeat: int = 60) -> None:
    """Join the other processes; before anything else of JAX is used.

    auto joins when the environment names a cluster of several processes (our launcher,
    or Cloud TPU, SLURM, GKE and Open MPI as JAX itself detects them) and does nothing
    otherwise; on joins or fails; off does nothing.

    Args:
        timeout: seconds to wait for all processes. heartbeat: seconds without a sign of
        life after which a process counts as dead, and all end.

    Raises:
        UserError: an unknown mode; on without a cluster; processes with different
        numbers of devices. RunError: the others cannot be reached, with exit code 1:
        starting again may help.
    """
    if mode not in MODES:
        raise UserError(f"--distributed {mode!r}: choose one of {', '.join(MODES)}")
    own = launcher_arguments()
    if mode == "off" or (mode == "auto" and not own and not in_cluster()):
        return
    # XLA's collectives on CPU block a thread of its pool each, and the pool has only as
    # many as there are cores or devices: two collectives over different axes of a mesh
    # can then wait for each other for ever. Its size is read from this variable.
    os.environ.setdefault("NPROC", str((os.cpu_count() or 1) + 32))
    try:
        jax.distributed.initialize(
            **own, initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat
        )
    except ValueError as error:  # nothing says where the others are
        raise UserError(
            f"--distributed {mode}: no cluster found ({first_line(error)}); start the processes with srun, on a TPU pod, or "
            "with python -m jaxppo.launch"
        ) from error
    except RuntimeError as error:
        where = own.get("coordinator_address", "the cluster's coordinator")
        raise RunError(
            f"the processes did not find each other at {where} within {timeout} s ({first_line(error)})"
        ) from error
    shares = Counter(device.process_index for device in jax.devices())
    if len(set(shares.values())) > 1:
        counts = ", ".join(f"process {i}: {n}" for i, n in sorted(shares.items()))
        raise UserError(f"every process needs the same number of devices, but here are {counts}")
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    print(f"{jax.process_count()} processes, {jax.device_count()} devices")


def launcher_arguments() -> dict[str, Any]:
    """What our launcher says, as arguments of `jax.distributed.initialize`; nothing
    when it did not start this process.
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
    """Whether JAX detects a cluster with more than one process. (JAX has no public
    question for it.)
    """
    from jax._src.clusters import ClusterEnv

    kinds = (
        kind
        for kind in ClusterEnv._cluster_types
        if not kind.opt_in_only_method and kind.is_env_present()
    )
    return any(kind.get_process_count() > 1 for kind in kinds)


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Process 0 goes through the block before the others enter it; `name` is the same
    on all.

    Where it fails, the others are ended by the heartbeat.
    """
    if not is_main():
        wait_for_all(name)
    yield
    if is_main():
        wait_for_all(name)


def wait_for_all(name: str) -> None:
    """Go on when all processes are here; at once when there is only one.

    No collective: XLA's on CPU give up when another process joins one for the first
    time more than 30 s later.
    """
    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))
        multihost.sync_global_processes(
            f"{name} {next(BARRIERS)}", timeout=WAIT, processes=everyone
        )


def broadcast_int(value: int) -> int:
    """Process 0's value, on all."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def broadcast_floats(values: Sequence[float]) -> list[float]:
    """Process 0's values, on all; of several processes in float32."""
    if jax.process_count() == 1:
        return list(values)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(values, np.float32))).tolist()


def to_host(tree: Any) -> Any:
    """Arrays that this process can read: those that lie on devices of several are
    gathered, one at a time, into NumPy arrays. All processes call it together.
    """

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                one(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        whole = x if x.is_fully_replicated else replicate(cast(NamedSharding, x.sharding).mesh)(x)
        return np.asarray(whole.addressable_data(0))

    return jax.tree.map(one, tree)


@functools.cache
def replicate(mesh: Mesh | AbstractMesh) -> Callable:
    """The program that puts an array whole on all devices of a mesh."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))

