"""Judges for the pool's workers to import; what a response says is done to the worker."""

import ctypes
import os
import signal
import sys
import time


def level(prompt: str, response: str, level: int, *, bonus: float = 0.5) -> float:
    return level + bonus


def judge(prompt: str, response: str) -> float:
    if response == "loop":
        while True:
            pass
    if response == "sleep in C":
        ctypes.CDLL(None).sleep(1000)
    if response == "allocate":
        return len(bytearray(2 * 2**30))
    if response == "exit":
        os._exit(1)
    if response == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if response == "print":
        print("garbage" * 1000)
        os.write(1, b"\x00" * 1000)
        sys.stderr.write("more")
    if response == "raise":
        raise RuntimeError("no idea " * 10_000)
    if response == "string":
        return "1.0"  # type: ignore[return-value]
    if response == "huge":
        return "x" * 10**7  # type: ignore[return-value]
    if response == "nan":
        return float("nan")
    if response == "platform":
        return float(os.environ["JAX_PLATFORMS"] == "cpu")
    if response == "pid":
        return float(os.getpid())
    return float(len(prompt) + len(response))
