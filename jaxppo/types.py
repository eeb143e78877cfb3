"""The data types that flow through the program, and the functions that pass them on.

Dimension letters, the same everywhere: B rows in this program's view, P prompt length,
T response length, L = P + T, G samples per prompt, V vocabulary, D width, N layers, H
heads, R rewards.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
Params = Mapping[str, Any]
Scalar = float | int | Float[Array, ""]


class Prompts(struct.PyTreeNode):
    """One batch of prompts. The G copies of a prompt are adjacent and never straddle
    devices.
    """

    tokens: Int[Array, "B P"]  # padded on the left
    mask: Bool[Array, "B P"]  # True on the prompt's own tokens
    # number of the row in the global batch: the sampler's noise hangs on it
    index: Int[Array, "B"]
    extra: PyTree = struct.field(
        default_factory=dict
    )  # [B ...]: references, labels, task ids, features


class Rollout(struct.PyTreeNode):
    """Prompts with their responses, and what the sampler, the reference and the value
    head said of them.
    """

    tokens: Int[Array, "B L"]
    attend: Bool[Array, "B L"]  # True on prompt and response tokens, False on padding
    # 1 on sampled tokens, up to and including the end of text
    mask: Float[Array, "B T"]
    finished: Bool[Array, "B"]  # the response ended by itself
    logprobs: Float[Array, "B T"]  # of the sampler, with all its logits processors
    raw_logprobs: Float[Array, "B T"]  # with the temperature only
    # of the reference policy, with the temperature only
    ref_logprobs: Float[Array, "B T"]
    values: Float[Array, "B T"]  # 0 without a critic
    extra: PyTree = struct.field(default_factory=dict)
    index: PyTree = (
        # Int[B]: number of the row in the global batch, where it came from a batch of
        # prompts
        None
    )

    @property
    def response(self) -> Int[Array, "B T"]:
        return self.tokens[:, -self.mask.shape[1] :]


class Batch(struct.PyTreeNode):
    """What the update needs, all of it constant while the epochs run."""

    rollout: Rollout
    # loss mask: the rollout's mask without invalid and filtered rows
    mask: Float[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]


class TrainState(struct.PyTreeNode):
    """Everything a run needs to go on, in one pytree. `frozen` never changes and is not
    donated.
    """

    step: Int[Array, ""]
    key: jax.Array  # typed PRNG key of the run; every step folds its number in
    params: Params  # only what is trained
    # {"base": untrained weights, "reference": or None = base alone, "reward": ...}
    frozen: Params
    opt_state: PyTree
    controller: PyTree  # {"kl_coef": Float[], "beta": Float[]}
    # {"reward": Moments, "gain", "bias", "baseline"} and, for NLPO, "lagged": an older
    # copy of params
    statistics: PyTree
    cursor: Int[Array, ""]  # prompts consumed
    counters: PyTree  # Int[] each: what went wrong so far


class Model(NamedTuple):
    """One architecture as pure functions. The cache is whatever that architecture needs
    to go on token by token.
    """

    init: Callable[..., Params]  # init(key) -> params
    init_cache: Callable[..., PyTree]  # init_cache(batch, length, dtype) -> cache
    apply: Callable[
        ..., tuple[Array, PyTree]
    ]  # apply(params, tokens [B L], attend [B L], *, cache, context, dropout_key)
    logits: Callable[..., Array]  # logits(params, hidden [... D]) -> Float32[... V]
    value: Callable[..., Array]  # value(params, hidden [... D]) -> Float32[...]
    head: Callable[..., Array]  # head(params) -> [V D], the matrix behind `logits`
    dtype: Any  # of the inputs of matrix products


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
    """The swappable parts of a train step: one function each, with the signatures
    above.
    """

    reward: RewardFn
    token_rewards: TokenRewardsFn
    advantage: AdvantageFn
    policy_loss: PolicyLossFn
    aggregate: AggregateFn
    kl: Callable[[Array, Array], Array]
    value_loss: Callable[..., Array] | None  # None = no critic
    correction: Callable[[Array, Array, Array], Array] | None = None
    update: Callable[..., Callable] | None = (
        # make_update(model, parts, config, axis_name=); None = `update.make_update`
        None
    )
    greedy: bool = (
        # roll out once more with argmax and put its scores into
        # `extra["greedy_scores"]`
        False
    )
    penalty: bool = False  # the policy loss takes beta= from the controller


def check(prompts: Prompts, *, prompt_length: int) -> None:
    """Shapes and dtypes of a batch of prompts, once, while tracing. Raises
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
