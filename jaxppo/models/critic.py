"""A separate critic behind the interface of one model, and initial value heads."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo.errors import UserError
from jaxppo.types import Model, Params


def with_critic(actor: Model, critic: Model, *, width: int) -> Model:
    """Actor and critic as one model: the critic's parameters are under "critic", its
    hidden states behind the actor's, which have this `width`. Without "critic" in the
    parameters (a reference policy) only the actor runs.
    """
    without = lambda params, key: {name: x for name, x in params.items() if name != key}

    def init(key):
        actor_key, critic_key = jax.random.split(key)
        # the actor's value head is not used
        return {**without(actor.init(actor_key), "value"), "critic": critic.init(critic_key)}

    def init_cache(batch, length, dtype=actor.dtype, **options):
        return pair_of_caches(actor.init_cache, critic.init_cache, batch, length, dtype, **options)

    def apply(params, tokens, attend, *, cache=None, **options) -> tuple[Array, Any]:
        own, other = (None, None) if cache is None else cache
        hidden, own = actor.apply(without(params, "critic"), tokens, attend, cache=own, **options)
        if "critic" in params:
            seen, other = critic.apply(params["critic"], tokens, attend, cache=other, **options)
            hidden = jnp.concatenate([hidden, seen], -1)
        return hidden, None if cache is None else (own, other)

    def logits(params, hidden):
        return actor.logits(without(params, "critic"), hidden[..., :width])

    def value(params, hidden):
        return critic.value(params["critic"], hidden[..., width:])

    packs = actor.packs and critic.packs
    return Model(init, init_cache, apply, logits, value, actor.head, actor.dtype, packs=packs)


def pair_of_caches(first, second, *args, prompt=None) -> tuple[Any, Any]:
    """The caches of two networks that read the same tokens; `prompt` is a pair, too."""
    if prompt is None:
        return first(*args), second(*args)
    return first(*args, prompt=prompt[0]), second(*args, prompt=prompt[1])


def init_value(params: Params, key: Array, kind: str, reward: Params | None = None) -> dict:
    """The parameters with an initialised value head.

    zero     the first advantages are the returns
    normal   standard deviation 1 / √(D + 1) (https://arxiv.org/abs/2009.01325)
    reward   that of the reward model `reward`; for a separate critic all its parameters

    Raises UserError if the reward model has another shape.
    """
    separate = "critic" in params
    critic = dict(params["critic"] if separate else params)
    kernel = critic["value"]["kernel"]
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if kind == "normal":
        start = jax.random.normal(key, kernel.shape) * (kernel.shape[0] + 1) ** -0.5
        critic["value"] = {**critic["value"], "kernel": start}
    elif kind == "reward":
        reward = reward or {}
        if "value" not in reward or reward["value"]["kernel"].shape != kernel.shape:
            raise UserError(
                "--value-init reward needs a --reward-model RUN with the critic's shape; or use"
                " zero or normal"
            )
        for name in critic if separate else ("value",):
            if shapes(critic[name]) != shapes(reward[name]):
                raise UserError(
                    f"--value-init reward: {name!r} of the reward model has another shape than the"
                    " critic's"
                )
            # a copy: each step donates the critic's parameters
            critic[name] = jax.tree.map(jnp.array, reward[name])
    return {**params, "critic": critic} if separate else critic
