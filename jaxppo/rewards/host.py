"""Use a Python function of text as a reward: the program calls it on the host."""

import copy
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxppo.types import Params, RewardFn, Rollout

Decode = Callable[[Sequence[Sequence[int]]], Sequence[str]]
log = logging.getLogger(__name__)
LARGEST = float(np.finfo(np.float32).max)
SIGNALS = (
    " (the step calls rewards in another thread: turn off timeouts by signals, such as "
    "timeout_seconds=None of math_verify, or use a RewardPool)"
)


def on_host(
    fn: Callable[..., Any],
    decode: Decode,
    *,
    pure: bool = True,
    batched: bool = False,
    references: bool = False,
    columns: Mapping[str, Sequence[Any]] | None = None,
    scores: Sequence[str] = (),
) -> RewardFn:
    """Make a reward of `fn(prompt, response) -> float`, which sees decoded text.

    A row is invalid when `fn` raises or returns anything but a finite number: a warning
    names the row, and neither the loss nor any statistic uses it.

    Args:
        fn: the judge, called once per row.
        decode: lists of token ids -> strings (`tokenizer.decode_batch`, which keeps
            special tokens inside an answer, such as `<think>`, if the chat template has
            them; `partial(tokenizer.decode_batch, skip_special=False)` keeps them all).
            A response is decoded together with its prompt (`decode_responses`).
        pure: False if calls depend on a state (randomness, a cache that changes
            scores): JAX may skip or repeat calls of a pure function.
        batched: `fn` takes lists of all prompts and responses and returns one number
            per row, as a `RewardPool` does. When it raises, or returns another number
            of scores, every row is invalid.
        references: `fn` takes the decoded reference as its third argument, from
            `extra["reference"]` Int[B T'] and `extra["reference_length"]` Int[B].
        columns: values for each row of the data, which `fn` takes by name;
            `extra["row"]` Int[B] has the row's number. A column "prompt" replaces the
            decoded prompt.
        scores: names of several scores. `fn` returns a dict of them, and the scores are
            [B R] in this order.
    """

    def score_rows(tokens, attend, mask, index, *more) -> np.ndarray:
        tokens, attend = np.asarray(tokens), np.asarray(attend)
        cut = tokens.shape[1] - mask.shape[1]
        kept = lambda rows, keep: [row[k].tolist() for row, k in zip(rows, keep, strict=True)]
        prompts, responses = decode_responses(
            decode, kept(tokens[:, :cut], attend[:, :cut]), kept(tokens[:, cut:], attend[:, cut:])
        )
        texts: list[Sequence[str]] = [prompts, responses]
        if references:
            ids, length = (np.asarray(x) for x in more)
            texts.append(decode(kept(ids, np.arange(ids.shape[1])[None] < length[:, None])))
        named: dict[str, list] = {}
        if columns is not None:
            of_rows = [int(row) for row in np.asarray(more[0])]
            named = {
                name: [own_copy(values[row]) for row in of_rows] for name, values in columns.items()
            }
            texts[0] = named.pop("prompt", prompts)
        if batched:
            answers = _call_batched(fn, *texts, **named)
        else:
            answers = [
                attempt(fn, *row, **{name: values[n] for name, values in named.items()})
                for n, row in enumerate(zip(*texts, strict=True))
            ]
        rows = zip(answers, np.asarray(index), prompts, strict=True)
        return np.array(
            [_to_scores(x, scores, f"row {int(i)} ({prompt[:60]!r})") for x, i, prompt in rows],
            np.float32,
        )

    def reward(params: Params, rollout: Rollout):
        shape = jax.ShapeDtypeStruct(
            rollout.finished.shape + ((len(scores),) if scores else ()), jnp.float32
        )
        # under vmap (a sweep) the runs are scored one after another
        pure_call = functools.partial(jax.pure_callback, vmap_method="sequential")
        call = pure_call if pure else io_callback
        index = jnp.arange(len(rollout.finished)) if rollout.index is None else rollout.index
        names = ("reference", "reference_length") if references else ()
        names = names if columns is None else ("row",)
        more = [rollout.extra[name] for name in names]
        found = call(score_rows, shape, rollout.tokens, rollout.attend, rollout.mask, index, *more)
        finite = jnp.isfinite(found)
        return jnp.where(finite, found, 0.0), finite.all(-1) if scores else finite

    return reward


def decode_responses(
    decode: Decode, prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> tuple[list[str], list[str]]:
    """(texts of the prompts, texts of the responses). A response is what its prompt's
    text goes on with: alone, it would lose the space that it begins with
    (SentencePiece), or the rest of a character.
    """
    before = list(decode(prompts))
    whole = decode([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
    return before, [_behind(*pair) for pair in zip(before, whole, strict=True)]


def _behind(start: str, text: str) -> str:
    """The text without what it has in common with `start`. The last character of a
    prompt may be the response's: half of it is another one.
    """
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(start, text, strict=False))
    return text[sum(1 for _ in same) :]


def attempt(fn: Callable, *args, **named) -> Any:
    """Return the result, or the exception: raised in a callback, it would destroy the
    donated state of the step. The working directory stays, and a forked child ends.
    """
    place, process = os.getcwd(), os.getpid()
    try:
        return fn(*args, **named)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as SystemExit or asyncio.CancelledError
        return error
    finally:
        if os.getpid() != process:
            os._exit(0)
        if os.getcwd() != place:
            log.warning("a reward changed the working directory; it is %s again", place)
            os.chdir(place)


def call_apart(fn: Callable[[], Any]) -> Any:
    """Return the result, or the exception, of a call in another thread than Python's
    main one, as the step's calls are: signals do not work there.
    """
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(attempt(fn))
        except KeyboardInterrupt as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join()
    if isinstance(found[0], KeyboardInterrupt):
        raise found[0]
    return found[0]


def signal_cure(error: Any) -> str:
    """What to do about an error that says that signals do not work, or ""."""
    return SIGNALS if isinstance(error, ValueError) and "main thread" in str(error) else ""


def own_copy(value: Any) -> Any:
    """Return a copy of a chat, list or array: a reward may change what it is given."""
    if not isinstance(value, list | dict | set | bytearray | np.ndarray):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # something in it cannot be copied
        return value


def _call_batched(fn: Callable, *texts: Sequence[str], **named: Sequence[Any]) -> list:
    """Return one result per row; if the call fails, its exception for every row."""
    rows, answers = len(texts[0]), attempt(fn, *texts, **named)
    if isinstance(answers, BaseException):
        return [answers] * rows
    unordered = isinstance(answers, Mapping | Set | str)
    listed = TypeError() if unordered else attempt(list, answers)
    if not isinstance(listed, BaseException) and len(listed) == rows:
        return listed
    bad = isinstance(listed, BaseException)
    found = f"a {type(answers).__name__}" if bad else f"{len(listed)} rewards"
    return [ValueError(f"expected {rows} rewards, but got {found}")] * rows


def _to_scores(answer: Any, scores: Sequence[str], name: str) -> float | list[float]:
    """Return the score, or the named scores of a dict in order; NaN for all of them and
    a warning if one is missing, unknown or no finite number.
    """
    if not scores:
        return _to_score(answer, name)
    if isinstance(answer, Mapping):
        found = sorted(map(str, answer))
        if found == sorted(scores):
            return [_to_score(answer[score], f"{name}, {score}") for score in scores]
        answer = ValueError(f"scores {', '.join(found)} instead of {', '.join(scores)}")
    elif not isinstance(answer, BaseException):
        answer = TypeError(f"expected a dict of {', '.join(scores)}, but got {answer!r}")
    return [_to_score(answer, name)] * len(scores)


def _to_score(answer: Any, name: str) -> float:
    """Return a finite score, or NaN and a warning that names the row."""
    if isinstance(answer, str | Mapping) or answer is None:
        answer = TypeError(f"a reward must be a number, but is {answer!r}")
    score = answer if isinstance(answer, BaseException) else attempt(float, answer)
    if isinstance(score, float) and not abs(score) <= LARGEST:
        score = ValueError(f"a reward must be finite in float32, but is {score}")
    if isinstance(score, float):
        return score
    kind = type(score).__name__
    said = f"{score}{signal_cure(score)}"
    log.warning("the reward of %s failed: %s: %s; the row is left out", name, kind, said)
    return float("nan")
