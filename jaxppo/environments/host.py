"""Python functions as environments: the program calls a tool on the host.

The tool is `tool(state, text) -> (state, reply, reward, done)`, on the text of one
row's turn. This one adds fractions; any other text is the answer to 1/3 + 1/6:

>>> import re
>>> from fractions import Fraction
>>> def tool(state, text):
...     if found := re.fullmatch(r"=(\\d+)/(\\d+)\\+(\\d+)/(\\d+)\\n?", text):
...         a, b, c, d = map(int, found.groups())
...         return state, f"{Fraction(a, b) + Fraction(c, d)}\\n", 0.0, False
...     return state, "", float(text.strip() == "1/2"), True
>>> tool(None, "=1/3+1/6")
(None, '1/2\\n', 0.0, False)
>>> environment = on_host(tool, max_turns=2, turn_length=16, reply_length=8)

It may hang or crash: in `on_host(ToolPool(tool, seconds=5.0), ...)` each call has a
deadline and a process that can be killed.
"""

import itertools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from jaxppo.environments.text import PRINTABLE, Reply, TextEnvironment
from jaxppo.errors import first_line
from jaxppo.rewards.host import LARGEST, attempt, signal_cure
from jaxppo.rewards.pool import Outcome, Tool, ToolPool, check_answer

log = logging.getLogger(__name__)
# reset(a row of the instance, a number that depends on the row's key) -> state
Reset = Callable[[Mapping[str, Any], int], Any]
ENDED = -1  # instead of the number of an episode


class Running(struct.PyTreeNode):
    """What the program knows of the episodes on the host."""

    episode: Int[Array, "B"]  # its number there, ENDED if it is over
    turn: Int[Array, "B"]


class Episodes:
    """The states of running episodes, in Python. An episode leaves when it ends."""

    def __init__(self, tool: Tool | ToolPool, reset: Reset, max_turns: int, reply_length: int):
        self.tool, self.reset_row = tool, reset
        self.max_turns, self.reply_length = max_turns, reply_length
        self.states: dict[int, Any] = {}
        self.lock = threading.Lock()  # devices call from threads of their own
        self.numbers = itertools.count()

    def reset(self, instance: PyTree, seeds: Array) -> Int[np.ndarray, "B"]:
        """Start an episode for each row; returns their numbers. One whose reset fails
        ends in its first turn.
        """
        rows = [int(seed) for seed in np.asarray(seeds)]
        arrays = jax.tree.map(np.asarray, instance)
        with self.lock:
            numbers = [next(self.numbers) % 2**31 for _ in rows]
            for row, (number, seed) in enumerate(zip(numbers, rows, strict=True)):
                own = jax.tree.map(lambda x, row=row: x[row], arrays)
                self.states[number] = attempt(self.reset_row, own, seed)
        return np.array(numbers, np.int32)

    def step(
        self, episode: Array, turn: Array, text: Array, length: Array
    ) -> tuple[
        Int[np.ndarray, "B"],
        UInt8[np.ndarray, "B R"],
        Int[np.ndarray, "B"],
        Float[np.ndarray, "B"],
        Bool[np.ndarray, "B"],
    ]:
        """(numbers of the episodes, replies, their lengths, rewards, done)."""
        numbers, turns, texts, lengths = (np.array(x) for x in (episode, turn, text, length))
        replies = np.zeros((len(numbers), self.reply_length), np.uint8)
        sizes, rewards = np.zeros(len(numbers), np.int32), np.zeros(len(numbers), np.float32)
        running = np.flatnonzero(numbers != ENDED)
        read = lambda row: bytes(texts[row, : lengths[row]]).decode(errors="replace")
        state_of = lambda row: self.states.pop(int(numbers[row]), LookupError("it was over"))
        with self.lock:
            calls = [(state_of(row), read(row)) for row in running]
            for row, (answer, problem) in zip(running, self.call(calls), strict=True):
                if problem:
                    where = f"row {row} of the batch, turn {turns[row] + 1}"
                    log.warning("the tool failed in %s: %s; the episode ends", where, problem)
                    answer = (None, "", math.nan, True)
                state, reply, rewards[row], done = answer
                written = reply.encode(errors="replace")[: self.reply_length]
                replies[row, : len(written)] = list(written)
                sizes[row] = len(written)
                if done or turns[row] + 1 >= self.max_turns:
                    numbers[row] = ENDED
                else:
                    self.states[int(numbers[row])] = state
        return numbers, replies, sizes, rewards, np.equal(numbers, ENDED)

    def call(self, calls: Sequence[tuple[Any, str]]) -> list[Outcome]:
        """The tool's answer to each (state, text), and what went wrong."""
        good = [i for i, (state, _) in enumerate(calls) if not isinstance(state, BaseException)]
        if isinstance(self.tool, ToolPool):
            found = attempt(self.tool.call, [calls[i] for i in good])
            failed = isinstance(found, BaseException)
            outcomes = [(None, _describe(found))] * len(good) if failed else found
        else:
            outcomes = [_call_here(self.tool, *calls[i]) for i in good]
        answered = dict(zip(good, outcomes, strict=True))
        return [
            _check_reward(answered[i]) if i in answered else (None, _describe(state))
            for i, (state, _) in enumerate(calls)
        ]


def on_host(
    tool: Tool | ToolPool,
    reset: Reset = lambda instance, seed: None,
    *,
    max_turns: int,
    turn_length: int,
    reply_length: int,
    alphabet: bytes = PRINTABLE,
) -> TextEnvironment:
    """Make an environment of a Python function.

    When a call raises, returns something else or a reward that is not finite, or, in a
    `ToolPool`, is too late or ends its process, this row's episode ends with the reward
    NaN, which makes the row invalid; a warning says why. So does a failing `reset`.

    States stay on the host. A turn's call depends on the turn before, so they are in
    order; under `vmap` runs are called one after another, under `pmap` each device
    calls for its rows.

    Args:
        tool: see the module. It may change the state in place, except in a pool.
        reset: `reset(instance, seed) -> state`, with the row's own arrays, and a number
            that depends on the row's key; always in this process. No state by default.
    """
    host = Episodes(tool, reset, max_turns, reply_length)

    def start(instance: PyTree, keys: Array) -> Running:
        seeds = jax.vmap(jax.random.bits)(keys)
        shape = jax.ShapeDtypeStruct(seeds.shape, jnp.int32)
        episode = io_callback(host.reset, shape, instance, seeds)
        return Running(episode, jnp.zeros_like(episode))

    def step(state: Running, text: Array, length: Array) -> tuple[Running, Reply]:
        rows = len(state.episode)
        of = lambda dtype, *more: jax.ShapeDtypeStruct((rows, *more), dtype)
        shapes = (of(jnp.int32), of(jnp.uint8, reply_length), of(jnp.int32))
        shapes += (of(jnp.float32), of(jnp.bool_))
        length = jnp.clip(length, 0, turn_length)
        episode, *reply = io_callback(host.step, shapes, state.episode, state.turn, text, length)
        return Running(episode, state.turn + 1), Reply(*reply)

    return TextEnvironment(start, step, max_turns, turn_length, reply_length, alphabet)


def _call_here(tool: Tool, state: Any, text: str) -> Outcome:
    """The tool's answer, in this process."""
    answer = attempt(lambda: check_answer(tool(state, text)))
    return (None, _describe(answer)) if isinstance(answer, BaseException) else (answer, "")


def _check_reward(outcome: Outcome) -> Outcome:
    """The outcome, or what is wrong with its reward."""
    answer, problem = outcome
    if not problem and not abs(answer[2]) <= LARGEST:
        return None, f"a reward must be finite in float32, but is {answer[2]}"
    return outcome


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}{signal_cure(error)}"
