"""Turn a user's reward into a reward of the step, with the data's columns by name.

    reward(prompt, response, **columns) -> float | dict[str, float]    one row a call
    rewards(prompts, responses, **columns) -> list of such             all rows at once
    reward(params, rollout) -> (scores, valid)                         arrays, compiled
    {"name": any of these, ...}                                        several, added

They are told apart by the name of the first parameter. A function of text gets the
columns that its parameters name, and runs on the host.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxppo.errors import UserError, first_line
from jaxppo.rewards.host import on_host
from jaxppo.types import Params, RewardFn, Rollout

Decode = Callable[[Sequence[Sequence[int]]], Sequence[str]]
Weights = tuple[tuple[str, float], ...]


class NamedReward(NamedTuple):
    """A reward, and the names and weights of its columns (`Parts.score_weights`)."""

    fn: RewardFn
    score_weights: Weights = ()


def from_user(
    reward: Callable | Mapping[str, Callable],
    decode: Decode,
    columns: Mapping[str, Sequence[Any]],
    *,
    weights: Mapping[str, float] | None = None,
) -> NamedReward:
    """Make the reward of the step.

    Args:
      reward: a function, or functions by name, whose scores are added up.
      decode: lists of token ids -> strings (`tokenizer.decode_batch`).
      columns: values of each row of the data by name, "prompt" among them.
      weights: of the named scores; 1 by default. The names of a function that returns
        a dict come from a trial call on the first row with an empty response; if it
        raises there, from the weights.

    Raises UserError for a parameter that no column has, and for weights of other names.
    """
    weights = dict(weights or {})
    if isinstance(reward, Mapping):
        names = list(reward)
        made = [_make(fn, decode, columns, ()) for fn in reward.values()]
        fn = _side_by_side(made)
    elif _takes_arrays(reward):
        if weights:
            raise UserError("weights name the scores of a function of text; leave them out")
        return NamedReward(reward)
    else:
        names = _trial_names(reward, columns) or list(weights)
        fn = _make(reward, decode, columns, names)
    if unknown := set(weights) - set(names):
        raise UserError(
            f"no score is named {sorted(unknown)[0]!r}; the weights may name {', '.join(names)}"
        )
    return NamedReward(fn, tuple((name, float(weights.get(name, 1.0))) for name in names))


def fingerprint(fn: Callable | Mapping[str, Callable]) -> str:
    """A name and a hash of a function's source (of its bytecode, without source), by
    which runs with different functions are told apart. Values that it closes over do
    not count.

    >>> fingerprint(len)
    'len'
    """
    if isinstance(fn, Mapping):
        return "+".join(f"{name}:{fingerprint(part)}" for name, part in fn.items())
    plain = fn.func if isinstance(fn, functools.partial) else fn
    code = getattr(plain, "__code__", None)
    if code is None:
        return _name(plain)
    try:
        source = inspect.getsource(plain).encode()
    except (OSError, TypeError):
        source = code.co_code
    settings = repr(sorted(fn.keywords.items())) if isinstance(fn, functools.partial) else ""
    digest = hashlib.sha256(source + settings.encode()).hexdigest()[:8]
    return f"{_name(plain)}@{digest}"


def _make(
    fn: Callable, decode: Decode, columns: Mapping[str, Sequence[Any]], scores: Sequence[str]
) -> RewardFn:
    if _takes_arrays(fn):
        return fn
    chosen = _chosen_columns(fn, columns)
    batched = _parameters(fn)[0].name == "prompts"
    return on_host(fn, decode, batched=batched, columns=chosen, scores=scores)


def _side_by_side(rewards: Sequence[RewardFn]) -> RewardFn:
    """Each reward is a column; a row is valid where all are."""

    def fn(params: Params, rollout: Rollout):
        scores, valid = zip(*(reward(params, rollout) for reward in rewards))
        return jnp.stack(scores, 1), jnp.stack(valid).all(0)

    return fn


def _parameters(fn: Callable) -> list[inspect.Parameter]:
    found = list(inspect.signature(fn).parameters.values())
    if len(found) < 2:
        raise UserError(
            f"a reward takes (prompt, response, ...), but {_name(fn)} takes "
            f"{len(found)} parameter{'s' * (len(found) != 1)}"
        )
    return found


def _takes_arrays(fn: Callable) -> bool:
    return _parameters(fn)[0].name == "params"


def _chosen_columns(fn: Callable, columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """The prompts, and the columns that the parameters after the second name: all of
    them for `**columns`.
    """
    chosen = {"prompt": columns["prompt"]}
    for parameter in _parameters(fn)[2:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            chosen = {**columns, **chosen}
        elif parameter.name in columns:
            chosen[parameter.name] = columns[parameter.name]
        elif (
            parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        ):
            known = ", ".join(name for name in columns if name != "prompt") or "no others"
            raise UserError(
                f"the reward {_name(fn)} takes {parameter.name!r}, which is no column of the "
                f'data; besides "prompt" they have {known}'
            )
    return chosen


def _trial_names(fn: Callable, columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """The keys of what the function returns for the first row and an empty response;
    none if it returns no dict, or raises.
    """
    chosen = _chosen_columns(fn, columns)
    first = {name: values[0] for name, values in chosen.items()}
    batched = _parameters(fn)[0].name == "prompts"
    if _parameters(fn)[0].name in ("completions", "completion"):
        raise UserError(
            f"the reward {_name(fn)} takes {_parameters(fn)[0].name!r} first; here it is "
            "reward(prompt, response, **columns), or rewards(prompts, responses, **columns)"
        )
    try:
        if batched:
            prompts = [first.pop("prompt")]
            found = next(iter(fn(prompts, [""], **{name: [x] for name, x in first.items()})))
        else:
            found = fn(first.pop("prompt"), "", **first)
    except Exception as error:  # the step will say what is wrong, for each row
        print(
            f"note: {_name(fn)} raised {type(error).__name__} ({first_line(error)}) in a trial "
            "call with an empty response; if it returns a dict, name its scores with weights"
        )
        return []
    return [str(name) for name in found] if isinstance(found, Mapping) else []


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
