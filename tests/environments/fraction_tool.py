"""A tool that workers can import: it adds fractions, in Python's exact integers."""

import os
import re
import time
from fractions import Fraction

CALL = re.compile(r"=(\d+)/(\d+)\+(\d+)/(\d+)\n?")


def add(state: list[str], text: str):
    """Evaluates a call; any other text is an answer, right if it is the last result. The state
    holds all texts. What a turn says may also be done to the worker.
    """
    state = [*state, text]
    if found := CALL.fullmatch(text):
        a, b, c, d = map(int, found.groups())
        return state, f"{Fraction(a, b) + Fraction(c, d)}\n", 0.0, False  # may divide by 0
    if text == "exit":
        os._exit(3)
    if text == "sleep":
        time.sleep(1000)
    if text == "say nothing":
        return None
    if text == "nan":
        return state, "", float("nan"), False
    if text == "huge":
        return state, "", 1e300, False
    if text == "lock":
        import threading

        return threading.Lock(), "", 0.0, False
    if text == "count":
        return state, f"{len(state)}", 0.0, False
    return state, "", float(text.strip() == "1/2"), True


def late(row: int, text: str):
    """Sleeps in row 3; the others end with a reward of .5."""
    if row == 3:
        time.sleep(1000)
    return row, "", 0.5, True
