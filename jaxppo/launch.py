"""Several CPU processes on this machine, connected as those of a pod are: to try and
debug a pod's run on a laptop.

    python -m jaxppo.launch --processes 2 --devices 2 experiments/sentiment.py --tiny
    --steps 2

Process 0 writes here as if it were alone; the others' errors are marked with their
number. When one ends badly the rest are ended, and its exit code is ours; SIGTERM and
Ctrl-C are passed on to all.
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

# seconds that the others have to notice that one is gone, and to end by themselves
GRACE = 30.0


def main(args: Sequence[str] | None = None) -> int:
    """Run the script in N processes and return one exit code: the first that is not 0
    (128 + n for a signal n).
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
    """One process of the run, in a group of its own: a Ctrl-C reaches it once, through
    us.
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
    """Another process's complaints, line by line, with its number."""
    assert process.stderr is not None
    for line in process.stderr:
        print(f"[{number}] {line}", end="", file=sys.stderr, flush=True)


def wait(running: list[subprocess.Popen], *, grace: float = GRACE) -> int:
    """Wait for all; `grace` seconds after one has ended badly the rest are killed."""
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
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
