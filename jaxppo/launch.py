"""Start several connected CPU processes on this machine, to try out and debug a run of
several hosts, such as a TPU pod.

    python -m jaxppo.launch --processes 2 --devices 2 experiments/sentiment.py --tiny

Process 0 writes to this terminal as if it were alone; the errors of the others are
marked with their number. If one fails, the others are killed unless they end within 30
seconds, and its exit code is returned. SIGTERM and Ctrl-C are passed on to all.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from jaxppo.parallel.processes import LAUNCHER

GRACE = 30.0  # seconds that the others have to end after one has failed


def main(args: Sequence[str] | None = None) -> int:
    """Run a script in N processes. Returns the first exit code that is not 0 (128 + n
    for signal n).
    """
    parser = argparse.ArgumentParser(
        "python -m jaxppo.launch",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (default 2)")
    parser.add_argument(
        "--devices", type=int, default=1, help="simulated devices in each (default 1)"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="of the coordinator on localhost (default: a free one)"
    )
    parser.add_argument("script", help="a Python script")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="its own options")
    options = parser.parse_args(args)
    if options.processes < 1 or options.devices < 1:
        parser.error("--processes and --devices must be above 0")
    address = f"localhost:{options.port or free_port()}"
    command = [sys.executable, options.script, *options.options]
    running = [
        start(command, address, options.processes, number, options.devices)
        for number in range(options.processes)
    ]

    def forward(signum: int, _frame) -> None:
        for process in running:
            process.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, forward)
    return wait(running)


def start(
    command: list[str], address: str, processes: int, number: int, devices: int
) -> subprocess.Popen:
    """Start one process, in its own group, so that Ctrl-C reaches it only through this
    one.
    """
    own = dict(zip(LAUNCHER, (address, str(processes), str(number)), strict=True))
    env = os.environ | own | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if number == 0:
        return subprocess.Popen(command, env=env, start_new_session=True)
    pipes = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
        "errors": "replace",
    }
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    threading.Thread(target=relay_stderr, args=(process, number), daemon=True).start()
    return process


def relay_stderr(process: subprocess.Popen, number: int) -> None:
    """Print the stderr of another process, each line with its number."""
    assert process.stderr is not None
    for line in process.stderr:
        print(f"[{number}] {line}", end="", file=sys.stderr, flush=True)


def wait(running: list[subprocess.Popen], *, grace: float = GRACE) -> int:
    """Wait for all; `grace` seconds after one has failed, kill the rest."""
    code, deadline = 0, float("inf")
    while any(process.poll() is None for process in running):
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.05)
        bad = [process.returncode for process in running if process.poll()]
        if bad and not code:
            code, deadline = bad[0], time.monotonic() + grace
    code = code or next((process.returncode for process in running if process.returncode), 0)
    return 128 - code if code < 0 else code


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
