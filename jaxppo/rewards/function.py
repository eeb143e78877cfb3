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
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxppo.errors import UserError, first_line
from jaxppo.rewards.host import Decode, call_apart, on_host, own_copy, signal_cure
from jaxppo.rewards.pool import WorkerPool
from jaxppo.types import Params, RewardFn, Rollout

Weights = tuple[tuple[str, float], ...]
# what the second parameter of a function of text is usually called
RESPONSES = ("response", "responses", "completion", "completions")


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

    Raises UserError for what is no such function, a parameter that no column has, and
    weights that are not numbers or have other names.
    """
    weights = dict(weights or {})
    for name, x in weights.items():
        if not isinstance(x, numbers.Real) or not math.isfinite(x):
            raise UserError(f"the weight of {name!r} is {x!r}; give a finite number")
    for fn in reward.values() if isinstance(reward, Mapping) else [reward]:
        _check(fn, columns)
    if isinstance(reward, Mapping):
        if not reward:
            raise UserError("the reward is an empty dict; give a function, or functions by name")
        names = list(reward)
        made = [_make(fn, decode, columns, ()) for fn in reward.values()]
        fn = _side_by_side(made)
    elif _takes_arrays(reward):
        if weights:
            raise UserError("weights name the scores of a function of text; leave them out")
        return NamedReward(reward)
    else:
        names = _trial_names(reward, columns)
        if names == [] and weights:
            raise UserError(
                f"the reward {_name(reward)} returns one number, so there is no score named "
                f"{next(iter(weights))!r}; leave the weights out"
            )
        names = list(weights) if names is None else names
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
    if isinstance(fn, WorkerPool):
        return fingerprint(fn.fn)
    plain = fn.func if isinstance(fn, functools.partial) else fn
    code = getattr(plain, "__code__", None)
    if code is None:
        return _name(plain)
    try:
        source = inspect.getsource(plain).encode()
    except (OSError, TypeError):
        source = code.co_code
    settings = ""
    if isinstance(fn, functools.partial):
        settings = repr(sorted(fn.keywords.items())) + (repr(fn.args) if fn.args else "")
    digest = hashlib.sha256(source + settings.encode()).hexdigest()[:8]
    return f"{_name(plain)}@{digest}"


def fingerprint_whole(x: Any) -> str:
    """A hash of functions in which what they close over counts, too: other functions,
    arrays, numbers and texts; of other objects, the type and the functions in them.

    >>> add = lambda n: lambda x: x + n
    >>> fingerprint_whole(add(1)) == fingerprint_whole(add(2))
    False
    """
    digest, seen = hashlib.sha256(), {}

    def visit(x: Any) -> None:
        x = inspect.unwrap(x) if callable(x) else x  # of jax.vmap and jax.jit
        digest.update(f"{type(x).__name__} ".encode())
        if isinstance(x, str | bytes | int | float):
            digest.update(repr(x).encode())
        elif isinstance(x, np.ndarray | jax.Array):
            digest.update(f"{x.dtype}{x.shape}".encode() + np.asarray(x).tobytes())
        elif id(x) not in seen:
            seen[id(x)] = x  # also keeps it, so that no other object has its id
            for part in _inner(x):
                visit(part)

    visit(x)
    return digest.hexdigest()[:8]


def _inner(x: Any) -> Sequence[Any]:
    """What `fingerprint_whole` reads of a function or another object."""
    if isinstance(x, tuple):
        return x
    if isinstance(x, functools.partial):
        return x.func, x.args, *sorted(x.keywords.items())
    if inspect.ismethod(x):
        return x.__func__, x.__self__
    if inspect.isfunction(x):
        closed = [cell.cell_contents for cell in x.__closure__ or ()]
        return fingerprint(x), *(x.__defaults__ or ()), *closed
    if isinstance(x, type) or not hasattr(x, "__dict__"):
        return (_name(x),)
    return [part for part in vars(x).values() if callable(part)]


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


def _check(fn: Any, columns: Mapping[str, Sequence[Any]]) -> None:
    """Raise UserError for what is no reward, or takes its arguments in other order."""
    name = _name(fn)
    if not callable(fn) or inspect.isclass(fn):
        kind = f"the class {name}" if inspect.isclass(fn) else f"a {name}"
        raise UserError(f"a reward is a function, or functions by name, but is {kind}")
    if inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__):
        raise UserError(
            f"the reward {name} is async, which is not supported; give a function that runs it "
            "with asyncio.run"
        )
    form = "reward(prompt, response, **columns), or rewards(prompts, responses, **columns)"
    found = _signature(fn)
    first = found[0].name if found else ""
    if first in RESPONSES or (first in columns and first != "prompt"):
        raise UserError(f"the reward {name} takes {first!r} first; here it is {form}")
    second = _parameters(fn)[1].name
    if second in columns and second not in RESPONSES:
        raise UserError(f"the reward {name} takes {second!r} second; here it is {form}")


def _signature(fn: Callable) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(fn).parameters.values())
    except ValueError:  # of some functions that are not written in Python
        raise UserError(
            f"the parameters of the reward {_name(fn)} are not known; wrap it in a function"
        ) from None


def _parameters(fn: Callable) -> list[inspect.Parameter]:
    """Return the parameters; raise UserError unless the first two go by position."""
    found = _signature(fn)
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = sum(x.kind in by_place for x in found)
    if places < 2:
        hidden = any(x.kind is x.VAR_POSITIONAL for x in found)
        raise UserError(
            f"a reward takes (prompt, response, ...), but {_name(fn)} takes "
            + ("*args; put functools.wraps on its decorator, or name them" * hidden)
            + f"{places} parameter{'s' * (places != 1)} by position" * (not hidden)
        )
    return found


def _takes_arrays(fn: Callable) -> bool:
    return _parameters(fn)[0].name == "params"


def _chosen_columns(fn: Callable, columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """The prompts, and the columns that the parameters after the second name: all of
    them for `**columns`.
    """
    chosen = {"prompt": columns["prompt"]}
    taken = {x.name for x in _parameters(fn)[:2]}
    for parameter in _parameters(fn)[2:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            others = {name: x for name, x in columns.items() if name not in taken}
            chosen = {**others, **chosen}
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


def _trial_names(fn: Callable, columns: Mapping[str, Sequence[Any]]) -> list[str] | None:
    """The keys of what the function returns for the first row and an empty response; []
    if it returns no dict, None if it raises.
    """
    chosen = _chosen_columns(fn, columns)
    first = {name: own_copy(values[0]) for name, values in chosen.items()}
    batched = _parameters(fn)[0].name == "prompts"
    if batched:
        named = {name: [x] for name, x in first.items() if name != "prompt"}
        trial = lambda: next(iter(fn([first["prompt"]], [""], **named)))
    else:
        prompt = first.pop("prompt")
        trial = lambda: fn(prompt, "", **first)
    found = call_apart(trial)
    if isinstance(found, BaseException):  # the step will say what is wrong, for each row
        print(
            f"note: {_name(fn)} raised {type(found).__name__} ({first_line(found)}) in a trial "
            "call with an empty response; if it returns a dict, name its scores with weights"
            + signal_cure(found)
        )
        return None
    return [str(name) for name in found] if isinstance(found, Mapping) else []


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
