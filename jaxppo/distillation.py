"""On-policy distillation: a teacher reads what the policy has sampled, and the policy
learns to choose as the teacher would.

- As a reward, log π_T(aₜ) − log π(aₜ): the reverse KL from one sample. With gamma 1 its
  policy gradient is that of −KL(π‖π_T) of whole sequences; with gamma 0 it is that in
  each visited state, without the effect of a token on later states
  (https://thinkingmachines.ai/blog/on-policy-distillation).
- As a loss, an exact divergence over the vocabulary in each visited state
  (https://arxiv.org/abs/2306.13649). Each token teaches more, but the update computes
  the logits of both networks.

The teacher is any network with the policy's tokenizer. It may read another prompt, such
as one with a hint; then the network that the policy started from can be the teacher.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxppo import masked, policy, sampling
from jaxppo.config import Config
from jaxppo.rollout import reference_params
from jaxppo.types import Model, Params, Rollout


def teacher_params(frozen: Params) -> Params:
    """The teacher's parameters: its own, or those of the reference."""
    own = frozen.get("teacher")
    return reference_params(frozen) if own is None else own


def hinted(rolled: Rollout) -> Rollout:
    """The same responses to the prompts with hints, extra["hint_tokens"] Int[B P'] and
    extra["hint_mask"], if there are any.
    """
    if "hint_tokens" not in rolled.extra:
        return rolled
    own = slice(-rolled.mask.shape[1], None)
    join = lambda name, x: jnp.concatenate([rolled.extra[name], x[:, own]], 1)
    return rolled.replace(
        tokens=join("hint_tokens", rolled.tokens), attend=join("hint_mask", rolled.attend)
    )


def ask(
    teacher: Model,
    params: Params,
    rolled: Rollout,
    *,
    config: Config,
    with_states: bool,
    axes: tuple[str | None, ...] = (),
) -> tuple[Rollout, Float[Array, "B T"]]:
    """(the rollout, log π_T(aₜ) − log π(aₜ) after the temperature only, 0 at padding).

    with_states: extra["teacher_states"] of the rollout are the teacher's hidden states
    before each token [B T D], for `against`.
    """
    found = policy.rollout_logprobs(
        teacher,
        params,
        hinted(rolled),
        config=config,
        group_size=config.group_size,
        axes=axes,
        with_states=with_states,
    )
    if with_states:
        rolled = rolled.replace(extra={**rolled.extra, "teacher_states": found.states})
    return rolled, masked.keep(found.raw_logprobs - rolled.raw_logprobs, rolled.mask)


def against(
    teacher: Model, params: Params, divergence: Callable, *, config: Config
) -> Callable[[Array, Array], Array]:
    """The divergence between the policy's logits [N V] and the teacher's in its states
    [N D]: what `policy.response_logprobs` takes. Ids that only one of them has are
    padding of its embedding, and do not count.
    """

    def diverge(logits: Float[Array, "N V"], states: Float[Array, "N D"]) -> Float[Array, "N"]:
        own = sampling.temper(teacher.logits(params, states), temperature=config.temperature)
        shared = min(logits.shape[-1], own.shape[-1])
        return divergence(logits[:, :shared], own[:, :shared])

    return diverge
