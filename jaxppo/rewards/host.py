"""Any Python function of text as a reward, called from inside the compiled program."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxppo.types import RewardFn, Rollout

log = logging.getLogger(__name__)


def on_host(
    fn: Callable[..., Any],
    decode: Callable[[Sequence[Sequence[int]]], Sequence[str]],
    *,
    pure: bool = True,
    batched: bool = False,
    references: bool = False,
) -> RewardFn:
    """A reward function from `fn(prompt, response) -> float`, called for every row on
    the host with decoded text.

    `decode` turns lists of token ids into strings (`tokenizer.decode_batch`). A row
    whose call raises, or returns something that is not a finite number, is invalid: it
    leaves the loss and all statistics, and a warning names the row. A judge with a
    state of its own (a cache that changes scores, a random one) needs `pure=False`,
    since JAX may skip or repeat calls of a pure function. `batched`: fn takes the lists
    of all prompts and responses and returns a number for each, as a `RewardPool` does;
    when it raises, or returns another number of them, every row is invalid.
    `references`: fn takes the decoded reference as its third argument, from
    `extra["reference"]` (ids Int[B T'] from slot 0 on) and `extra["reference_length"]`
    Int[B].
    """

    def score_rows(tokens, attend, mask, index, *reference) -> np.ndarray:
        tokens, attend = np.asarray(tokens), np.asarray(attend)
        cut = tokens.shape[1] - mask.shape[1]
        ids = lambda rows, keep: decode(
            [row[k].tolist() for row, k in zip(rows, keep, strict=True)]
        )
        prompts = ids(tokens[:, :cut], attend[:, :cut])
        texts = [prompts, ids(tokens[:, cut:], attend[:, cut:])]
        if reference:
            wanted, length = (np.asarray(x) for x in reference)
            texts.append(ids(wanted, np.arange(wanted.shape[1])[None] < length[:, None]))
        names = [
            f"row {int(i)} ({prompt[:60]!r})"
            for i, prompt in zip(np.asarray(index), prompts, strict=True)
        ]
        answers = (
            _all(fn, *texts) if batched else [_try(fn, *row) for row in zip(*texts, strict=True)]
        )
        return np.array(
            [_number(answer, name) for answer, name in zip(answers, names, strict=True)], np.float32
        )

    def reward(params, rollout: Rollout):
        del params
        shape = jax.ShapeDtypeStruct(rollout.finished.shape, jnp.float32)
        # under vmap (a sweep): one run's rows after the other's
        call = (
            functools.partial(jax.pure_callback, vmap_method="sequential") if pure else io_callback
        )
        index = jnp.arange(len(rollout.finished)) if rollout.index is None else rollout.index
        wanted = (
            tuple(rollout.extra[name] for name in ("reference", "reference_length"))
            if references
            else ()
        )
        scores = call(
            score_rows, shape, rollout.tokens, rollout.attend, rollout.mask, index, *wanted
        )
        valid = jnp.isfinite(scores)
        return jnp.where(valid, scores, 0.0), valid

    return reward


def _try(fn: Callable, *args) -> Any:
    """The answer, or what was raised: a judge may fail in any way, one row must not end
    the run, and an exception in a callback would destroy the donated state of the
    step.
    """
    try:
        return fn(*args)
    except Exception as error:
        return error


def _all(fn: Callable, *texts: Sequence[str]) -> list:
    """One answer a row from a function of all; an exception or another number of
    answers is everybody's.
    """
    rows, answers = len(texts[0]), _try(fn, *texts)
    if isinstance(answers, Exception):
        return [answers] * rows
    counted = _try(list, answers)
    if isinstance(counted, Exception) or len(counted) != rows:
        found = (
            type(answers).__name__ if isinstance(counted, Exception) else f"{len(counted)} rewards"
        )
        return [ValueError(f"{rows} rewards are expected, but here is {found}")] * rows
    return counted


def _number(answer: Any, name: str) -> float:
    """The score of one row; NaN, with a warning that names the row, for anything but a
    finite number.
    """
    if isinstance(answer, str) or answer is None:
        answer = TypeError(f"a reward must be a number, but is {answer!r}")
    score = answer if isinstance(answer, Exception) else _try(float, answer)
    if isinstance(score, float) and not np.isfinite(score):
        score = ValueError(f"a reward must be finite, but is {score}")
    if isinstance(score, Exception):
        log.warning(
            "the reward of %s failed: %s: %s; the row is left out",
            name,
            type(score).__name__,
            score,
        )
        return float("nan")
    return float(score)
