"""Data types of the program, and signatures of its parts.

Dimension letters, unless a module says otherwise: B rows in this program's view (under
pmap, one device's), P prompt length, T response length, L = P + T, G samples per
prompt, V vocabulary, D width, N layers, H heads, R named rewards.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxppo.errors import UserError

PyTree = Any
Params = Mapping[str, Any]
Scalar = float | int | Float[Array, ""]
B = Float[Array, "B"]
BT = Float[Array, "B T"]


class Prompts(struct.PyTreeNode):
    """A batch of prompts. The G copies of a prompt are adjacent, on one device."""

    tokens: Int[Array, "B P"]  # padded on the left
    mask: Bool[Array, "B P"]  # True on the prompt's own tokens
    index: Int[Array, "B"]  # row in the global batch; the sampler's noise depends on it
    # arrays [B ...]: references, labels, task ids, features; "max_tokens" limits the
    # response of each row
    extra: PyTree = struct.field(default_factory=dict)


class Rollout(struct.PyTreeNode):
    """Prompts, their responses, and log-probs and values of the response tokens."""

    tokens: Int[Array, "B L"]
    attend: Bool[Array, "B L"]  # True on prompt and response tokens, False on padding
    mask: Float[Array, "B T"]  # 1 on sampled tokens, the end-of-text token included
    finished: Bool[Array, "B"]  # the response ended with the end of text or a stop text
    logprobs: Float[Array, "B T"]  # of the sampler, after all logits processors
    raw_logprobs: Float[Array, "B T"]  # of the policy, after the temperature only
    ref_logprobs: Float[Array, "B T"]  # of the reference, after the temperature only
    values: Float[Array, "B T"]  # 0 without a critic
    extra: PyTree = struct.field(default_factory=dict)
    index: PyTree = None  # Int[B] of `Prompts`, or None
    entropy: PyTree = None  # Float[B T] of the policy, in nats, if something reads it
    old_logprobs: PyTree = None  # Float[B T] of the scorer, or None: the sampler's
    # Float[B T] of an environment, on the last sampled token of each turn, or None
    rewards: PyTree = None

    @property
    def response(self) -> Int[Array, "B T"]:
        return self.tokens[:, -self.mask.shape[1] :]


class Batch(struct.PyTreeNode):
    """Input of the update, constant during its epochs."""

    rollout: Rollout
    mask: Float[Array, "B T"]  # the rollout's mask without invalid and filtered rows
    old_logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]
    weights: PyTree = None  # Float[B T], factors of the policy loss, or None
    scores: PyTree = None  # Float[B] after shaping, for the term on right answers, or None
    right: PyTree = None  # Float[B T], a minibatch's weights of that term, or None


class TrainState(struct.PyTreeNode):
    """The whole state of a run. `frozen` never changes and is not donated."""

    step: Int[Array, ""]
    key: jax.Array  # typed PRNG key of the run; every step folds its number in
    params: Params  # only what is trained
    # {"base": untrained weights, "reference": None = base, "reward": ...}, with stop
    # texts also "stop", a `sampling.Stops`; with another network as teacher "teacher"
    frozen: Params
    opt_state: PyTree
    controller: PyTree  # {"kl_coef": Float[], "beta": Float[]}
    # {"reward": Moments, "gain", "bias", "baseline"}, and copies (models/copies.py)
    statistics: PyTree
    cursor: Int[Array, ""]  # prompts consumed
    counters: PyTree  # Int[] each: skipped updates, invalid rows, ...


class Model(NamedTuple):
    """An architecture as pure functions. `cache` is whatever it needs for decoding."""

    init: Callable[..., Params]  # init(key) -> params
    init_cache: Callable[..., PyTree]  # init_cache(batch, length, dtype) -> cache
    # apply(params, tokens [B L], attend [B L], *, cache, context, dropout_key)
    # -> (hidden [B L D], cache); if it packs, also positions, segments
    apply: Callable[..., tuple[Array, PyTree]]
    logits: Callable[..., Array]  # logits(params, hidden [... D]) -> Float32[... V]
    value: Callable[..., Array]  # value(params, hidden [... D]) -> Float32[...]
    head: Callable[..., Array]  # head(params) -> [V D], the matrix behind `logits`
    dtype: Any  # of the inputs of matrix products
    # allowed(params, hidden [... D]) -> Bool[... V], the tokens that may be sampled, or
    # None for all of them; sampler and scorer both apply it (models/nlpo.py)
    allowed: Callable[..., Array | None] = lambda params, hidden: None
    # Whether rows may be packed: `apply` takes positions [B L] and segments [B L 2]
    # (`models.attention.packed_mask`), `init_cache` a prompt (`models/cache.py`).
    packs: bool = False


class Turn(struct.PyTreeNode):
    """What the policy wrote since it last had to read."""

    tokens: Int[Array, "B M"]
    length: Int[Array, "B"]


class Observation(struct.PyTreeNode):
    """What an environment answers to a turn."""

    tokens: Int[Array, "B O"]  # aligned on the right
    length: Int[Array, "B"]  # at least 1, unless the episode is done
    reward: Float[Array, "B"]  # of the turn; not finite = the row is invalid
    done: Bool[Array, "B"]  # nothing more is read or written


class Environment(NamedTuple):
    """A world that answers what the policy writes, as pure functions of arrays."""

    # reset(instance, keys [B]) -> state; the instance is the `extra` of the prompts
    reset: Callable[[PyTree, Array], PyTree]
    step: Callable[[PyTree, Turn], tuple[PyTree, Observation]]
    max_turns: int
    turn_length: int  # M, most tokens of a turn
    observation_length: int  # O, most tokens of an answer

    @property
    def length(self) -> int:
        """Slots of an episode: the T of its rollout."""
        return self.max_turns * (self.turn_length + self.observation_length)


class RewardFn(Protocol):
    def __call__(
        self, params: PyTree, rollout: Rollout
    ) -> tuple[Float[Array, "B"] | Float[Array, "B R"], Bool[Array, "B"]]: ...


class TokenRewardsFn(Protocol):
    def __call__(
        self, scores: Array, rollout: Rollout, *, kl_coef: Scalar, kl: Callable
    ) -> Float[Array, "B T"]: ...


class AdvantageFn(Protocol):
    def __call__(
        self,
        rewards: Array,
        scores: Array,
        rollout: Rollout,
        *,
        valid: Array,
        statistics: PyTree,
        axis_name: str | None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"], PyTree]: ...


class PolicyLossFn(Protocol):
    def __call__(
        self,
        logprobs: Array,
        old_logprobs: Array,
        advantages: Array,
        mask: Array,
        *,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T"], dict[str, Array]]: ...


class AggregateFn(Protocol):
    def __call__(self, mask: Array, *, axis_name: str | None = None) -> Float[Array, "B T"]: ...


class Parts(NamedTuple):
    """The parts of a train step that can be swapped: one function each, and what the
    step has to provide for it.
    """

    reward: RewardFn
    token_rewards: TokenRewardsFn
    advantage: AdvantageFn
    policy_loss: PolicyLossFn
    aggregate: AggregateFn
    kl: Callable[[Array, Array], Array]
    value_loss: Callable[..., Array] | None  # None = no critic
    correction: Callable[..., Array] | None = None
    rejection: Callable[[Array, Array, Array], Array] | None = None
    # make_update(model, parts, config, axis_name=); None = `update.make_update`
    update: Callable[..., Callable] | None = None
    # what answers the policy's turns; None = a response is one turn
    environment: Environment | None = None
    # `advantage` reads extra["greedy_scores"]: scores of a second, greedy rollout
    greedy: bool = False
    # `policy_loss` takes beta=, a coefficient that the controller adapts
    penalty: bool = False
    # `kl` takes the logits [N V] of policy and reference instead of log-probs
    full_kl: bool = False
    # the network of frozen["teacher"] (None = the reference's parameters), which reads
    # every rollout, and what the policy learns of it (`distillation.py`): a divergence
    # that takes the logits [N V] of policy and teacher, or, if None, a reward of tokens
    teacher: Model | None = None
    divergence: Callable[[Array, Array], Array] | None = None
    # names and weights of the columns of `reward`'s scores [B R]; each column is logged
    # as score_<name>, and the weighted columns take part in training
    score_weights: tuple[tuple[str, float], ...] = ()


# What each part is called with, and what it returns.
CALLS = {
    "reward": ("params, rollout", "(scores [B] or [B R], valid Bool[B])"),
    "token_rewards": ("scores, rollout, *, kl_coef, kl", "rewards [B T]"),
    "advantage": (
        "rewards, scores, rollout, *, valid, statistics, axis_name",
        "(advantages [B T], returns [B T], statistics as given)",
    ),
    "policy_loss": (
        "logprobs, old_logprobs, advantages, mask, *, key",
        "(per_token [B T], a dict of diagnostics [B T])",
    ),
    "aggregate": ("mask, *, axis_name", "weights [B T]"),
    "kl": ("logprobs, ref_logprobs", "an array like each of them"),
    "divergence": ("logits, teacher_logits", "numbers [N] of their rows [N V]"),
    "value_loss": ("values, old_values, returns", "losses [B T]"),
    "correction": ("old_logprobs, sampler_logprobs, mask, *, axis_name", "weights [B T]"),
    "rejection": ("old_logprobs, sampler_logprobs, mask", "a mask [B T]"),
}


def checked(parts: Parts) -> Parts:
    """The same parts; while they are traced, how they are called and what they return
    is checked. A wrong one raises UserError with the part, what is expected and what
    was found.
    """
    columns = len(parts.score_weights)

    def reward(out, params, rollout) -> tuple[bool, tuple]:
        rows = np.shape(rollout.finished)
        if not (isinstance(out, tuple) and len(out) == 2):
            return False, rows
        scores, valid = np.shape(out[0]), np.shape(out[1])
        wide = len(scores) == 2 and scores[:1] == rows and columns in (0, scores[1])
        good = (scores == rows and not columns) or wide
        return good and valid == rows and out[1].dtype == bool, rows

    def advantage(out, rewards, scores, rollout, *, statistics, **named) -> tuple[bool, tuple]:
        shape, shapes = np.shape(rewards), lambda tree: jax.tree.map(np.shape, tree)
        if not (isinstance(out, tuple) and len(out) == 3 and isinstance(out[2], Mapping)):
            return False, shape
        kept = {name: x for name, x in out[2].items() if name in statistics}
        return shapes((*out[:2], kept)) == (shape, shape, shapes(dict(statistics))), shape

    def policy_loss(out, logprobs, *args, **named) -> tuple[bool, tuple]:
        shape = np.shape(logprobs)
        good = isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping)
        return good and {np.shape(x) for x in (out[0], *out[1].values())} == {shape}, shape

    def kl(out, first, second) -> tuple[bool, tuple]:
        shape = np.shape(first)[:-1] if parts.full_kl else np.shape(first)
        return np.shape(out) == shape, shape

    like_first = lambda out, x, *args, **named: (np.shape(out) == np.shape(x), np.shape(x))
    like_mask = lambda out, scores, rollout, **named: like_first(out, rollout.mask)
    rules = {"reward": reward, "token_rewards": like_mask, "advantage": advantage, "kl": kl}
    rules |= {"policy_loss": policy_loss, "aggregate": like_first, "value_loss": like_first}
    rules |= {"correction": like_first, "rejection": like_first}
    rules["divergence"] = lambda out, x, _: (np.shape(out) == np.shape(x)[:-1], np.shape(x)[:-1])
    own = {name: part for name, part in parts._asdict().items() if name in rules and part}
    return parts._replace(**{name: _checked(name, x, rules[name]) for name, x in own.items()})


def _checked(name: str, part: Callable, rule: Callable[..., tuple[bool, tuple]]) -> Callable:
    takes, returns = CALLS[name]

    def call(*args, **named):
        try:
            inspect.signature(part).bind(*args, **named)
        except ValueError:  # a function in C has no signature
            pass
        except TypeError as error:
            given = "".join(f", {word}" for word in named if word not in takes)
            raise UserError(
                f"the part {name} is called as {name}({takes}{given}), which it does not take: "
                f"{error}"
            ) from None
        out = part(*args, **named)
        good, shape = rule(out, *args, **named)
        if not good:
            raise UserError(
                f"the part {name} must return {returns}, here of the shape {list(shape)}, but it "
                f"returns {_describe(out)}"
            )
        return out

    return call


def _describe(x: Any) -> str:
    """Dtypes and shapes of a value, in one line.

    >>> _describe((np.zeros(2), {"a": 1.0}, None))
    '(float64[2], {a: float}, None)'
    """
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{name}: {_describe(value)}" for name, value in x.items()) + "}"
    if isinstance(x, tuple | list):
        return "(" + ", ".join(map(_describe, x)) + ")"
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return f"{x.dtype}{list(x.shape)}"
    return "None" if x is None else type(x).__name__


def check_prompts(prompts: Prompts, *, prompt_length: int) -> None:
    """Check shapes and dtypes of a batch of prompts while tracing. Raises
    ValueError.
    """
    rows = prompts.tokens.shape[0]
    expected = {
        "tokens": ((rows, prompt_length), "i"),
        "mask": ((rows, prompt_length), "b"),
        "index": ((rows,), "i"),
    }
    for name, (shape, kind) in expected.items():
        x = getattr(prompts, name)
        if x.shape != shape or x.dtype.kind != kind:
            raise ValueError(
                f"prompts.{name} must be {kind}{list(shape)}, but is {x.dtype.name}{list(x.shape)}"
            )
