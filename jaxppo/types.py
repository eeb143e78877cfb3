"""Data types of the program, and signatures of its parts.

Dimension letters, the same everywhere: B rows in this program's view, P prompt length,
T response length, L = P + T, G samples per prompt, V vocabulary, D width, N layers,
H heads, R rewards.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

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
    # arrays [B ...]: references, labels, task ids, features
    extra: PyTree = struct.field(default_factory=dict)


class Rollout(struct.PyTreeNode):
    """Prompts, their responses, and log-probs and values of the response tokens."""

    tokens: Int[Array, "B L"]
    attend: Bool[Array, "B L"]  # True on prompt and response tokens, False on padding
    mask: Float[Array, "B T"]  # 1 on sampled tokens, the end-of-text token included
    finished: Bool[Array, "B"]  # the response ended with the end of text or a stop text
    logprobs: Float[Array, "B T"]  # of the sampler, after all logits processors
    raw_logprobs: Float[Array, "B T"]  # of the sampler, after the temperature only
    ref_logprobs: Float[Array, "B T"]  # of the reference, after the temperature only
    values: Float[Array, "B T"]  # 0 without a critic
    extra: PyTree = struct.field(default_factory=dict)
    index: PyTree = None  # Int[B] of `Prompts`, or None

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


class TrainState(struct.PyTreeNode):
    """The whole state of a run. `frozen` never changes and is not donated."""

    step: Int[Array, ""]
    key: jax.Array  # typed PRNG key of the run; every step folds its number in
    params: Params  # only what is trained
    # {"base": untrained weights, "reference": None = base, "reward": ...}, with stop
    # texts also "stop", a `sampling.Stops`
    frozen: Params
    opt_state: PyTree
    controller: PyTree  # {"kl_coef": Float[], "beta": Float[]}
    # {"reward": Moments, "gain", "bias", "baseline"}, for NLPO also "lagged"
    statistics: PyTree
    cursor: Int[Array, ""]  # prompts consumed
    counters: PyTree  # Int[] each: skipped updates, invalid rows, ...


class Model(NamedTuple):
    """An architecture as pure functions. `cache` is whatever it needs for decoding."""

    init: Callable[..., Params]  # init(key) -> params
    init_cache: Callable[..., PyTree]  # init_cache(batch, length, dtype) -> cache
    # apply(params, tokens [B L], attend [B L], *, cache, context, dropout_key)
    # -> (hidden [B L D], cache)
    apply: Callable[..., tuple[Array, PyTree]]
    logits: Callable[..., Array]  # logits(params, hidden [... D]) -> Float32[... V]
    value: Callable[..., Array]  # value(params, hidden [... D]) -> Float32[...]
    head: Callable[..., Array]  # head(params) -> [V D], the matrix behind `logits`
    dtype: Any  # of the inputs of matrix products
    # allowed(params, hidden [... D]) -> Bool[... V], the tokens that may be sampled, or
    # None for all of them; sampler and scorer both apply it (models/nlpo.py)
    allowed: Callable[..., Array | None] = lambda params, hidden: None


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
    correction: Callable[[Array, Array, Array], Array] | None = None
    # make_update(model, parts, config, axis_name=); None = `update.make_update`
    update: Callable[..., Callable] | None = None
    # `advantage` reads extra["greedy_scores"]: scores of a second, greedy rollout
    greedy: bool = False
    # `policy_loss` takes beta=, a coefficient that the controller adapts
    penalty: bool = False
    # `kl` takes the logits [N V] of policy and reference instead of log-probs
    full_kl: bool = False
    # names and weights of the columns of `reward`'s scores [B R]; each column is logged
    # as score_<name>, and the weighted columns take part in training
    score_weights: tuple[tuple[str, float], ...] = ()


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
