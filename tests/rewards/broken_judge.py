"""A judge whose module can be imported once only: here, not in a worker."""

import sys

if "pytest" not in sys.modules:
    raise ImportError("not in a worker")


def judge(prompt: str, response: str) -> float:
    return 0.0
