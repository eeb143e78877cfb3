"""Any Python function of text as a reward, called from inside the compiled program."""

import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxppo.types import RewardFn, Rollout

log = logging.getLogger(__name__)


def on_host(
    fn: Callable[[str, str], float], decode: Callable[[Sequence[Sequence[int]]], Sequence[str]], *, pure: bool = True
) -> RewardFn:
    """A reward function from `fn(prompt, response) -> float`, called for every row on the host with decoded text.

    `decode` turns lists of token ids into strings (`tokenizer.decode_batch`). A row whose call raises, or returns something
    that is not a finite number, is invalid: it leaves the loss and all statistics. A judge with a state of its own (a cache that
    changes scores, a random one) needs `pure=False`, since JAX may skip or repeat calls of a pure function.
    """

    def score_rows(tokens, attend, mask) -> np.ndarray:
        tokens, attend = np.asarray(tokens), np.asarray(attend)
        cut = tokens.shape[1] - mask.shape[1]
        ids = lambda rows, keep: decode([row[k].tolist() for row, k in zip(rows, keep, strict=True)])
        prompts = ids(tokens[:, :cut], attend[:, :cut])
        responses = ids(tokens[:, cut:], attend[:, cut:])
        return np.array([_one(fn, p, r) for p, r in zip(prompts, responses, strict=True)], np.float32)

    def reward(params, rollout: Rollout):
        del params
        shape = jax.ShapeDtypeStruct(rollout.finished.shape, jnp.float32)
        call = jax.pure_callback if pure else io_callback
        scores = call(score_rows, shape, rollout.tokens, rollout.attend, rollout.mask)
        valid = jnp.isfinite(scores)
        return jnp.where(valid, scores, 0.0), valid

    return reward


def _one(fn, prompt: str, response: str) -> float:
    """The score of one row; NaN for anything but a finite number."""
    try:
        score = fn(prompt, response)
        if isinstance(score, str) or score is None:
            raise TypeError(f"a reward must be a number, but is {score!r}")
        return float(score)
    except Exception as error:  # a judge may fail in any way; one row must not end the run, and an exception in here would
        # destroy the donated state of the step
        log.warning("reward failed on %r: %s: %s; the row is left out", response[:60], type(error).__name__, error)
        return float("nan")
