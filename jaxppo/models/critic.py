"""A critic of its own, behind the interface of one model; and how a value head
starts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo.errors import UserError
from jaxppo.types import Model, Params


def with_critic(actor: Model, critic: Model, *, width: int) -> Model:
    """Actor and critic as one model: the critic's parameters stand under "critic", its
    hidden states behind the actor's.

    `width` is that of the actor's hidden states. Without "critic" in the parameters (a
    reference policy) only the actor runs.
    """

    def init(key):
        one, other = jax.random.split(key)
        own = {
            name: x for name, x in actor.init(one).items() if name != "value"
        }  # nobody asks the actor for values
        return {**own, "critic": critic.init(other)}

    def init_cache(batch, length, dtype=actor.dtype):
        return actor.init_cache(batch, length, dtype), critic.init_cache(batch, length, dtype)

    def apply(
        params, tokens, attend, *, cache=None, context=None, dropout_key=None
    ) -> tuple[Array, Any]:
        options: dict[str, Any] = {"context": context, "dropout_key": dropout_key}
        one, other = (None, None) if cache is None else cache
        own = {name: x for name, x in params.items() if name != "critic"}
        hidden, one = actor.apply(own, tokens, attend, cache=one, **options)
        if "critic" in params:
            seen, other = critic.apply(params["critic"], tokens, attend, cache=other, **options)
            hidden = jnp.concatenate([hidden, seen], -1)
        return hidden, None if cache is None else (one, other)

    def logits(params, hidden):
        return actor.logits(
            {name: x for name, x in params.items() if name != "critic"}, hidden[..., :width]
        )

    def value(params, hidden):
        return critic.value(params["critic"], hidden[..., width:])

    return Model(init, init_cache, apply, logits, value, actor.head, actor.dtype)


def init_value(params: Params, key: Array, kind: str, reward: Params | None = None) -> dict:
    """The parameters with their value head at its start.

    zero     the first advantages are the returns themselves (Huang et al. 2022, "The 37 implementation details of PPO")
    normal   standard deviation 1 / √(D + 1), as reward models are started (Stiennon et al. 2020, https://arxiv.org/abs/2009.01325)
    reward   the head of `reward`, parameters of a reward model of the same shape; for a separate critic its trunk too

    Raises UserError if the reward model has another shape.
    """
    where = "critic" if "critic" in params else None
    owner = dict(params["critic"] if where else params)
    kernel = owner["value"]["kernel"]
    if kind == "normal":
        owner["value"] = {
            **owner["value"],
            "kernel": jax.random.normal(key, kernel.shape) * (kernel.shape[0] + 1) ** -0.5,
        }
    elif kind == "reward":
        if (
            reward is None
            or "value" not in reward
            or reward["value"]["kernel"].shape != kernel.shape
        ):
            raise UserError(
                "--value-init reward needs a --reward-model RUN with the critic's shape; or use zero or normal"
            )
        for name in owner if where else ("value",):
            if jax.tree.map(jnp.shape, owner[name]) != jax.tree.map(jnp.shape, reward[name]):
                raise UserError(
                    f"--value-init reward: {name!r} of the reward model has another shape than the critic's"
                )
            owner[name] = jax.tree.map(
                jnp.array, reward[name]
            )  # a copy: the critic's are donated to each step
    return {**params, where: owner} if where else owner
