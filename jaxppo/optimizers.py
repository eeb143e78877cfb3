"""Optimizers made of Optax's parts: gradient clipping, an update rule, and a
learning-rate schedule.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.types import Params, PyTree, Scalar

CRITIC = ("value", "critic")  # top-level names of the critic's parameters

RULES: dict[str, Callable[[Config], optax.GradientTransformation]] = {
    # eps is 1e-5 by default (Huang et al. 2022, "The 37 implementation details of PPO")
    "adam": lambda c: optax.scale_by_adam(eps=c.adam_eps),
    # decoupled weight decay (https://arxiv.org/abs/1711.05101)
    "adamw": lambda c: optax.chain(
        optax.scale_by_adam(eps=c.adam_eps), optax.add_decayed_weights(c.weight_decay)
    ),
    # the decay of A2C's first implementation (https://arxiv.org/abs/1602.01783)
    "rmsprop": lambda c: optax.scale_by_rms(decay=0.99, eps=c.adam_eps),
    "sgd": lambda c: optax.identity(),
}


def schedule(config: Config, peak: Scalar) -> Scalar | optax.Schedule:
    """The learning rate of each update: linear warm-up to `peak`, then constant, or
    linear or cosine decay to 0.
    """
    warmup = config.lr_warmup * config.epochs * config.minibatches
    left = max(config.updates - warmup, 1)
    after: Any = {
        "constant": lambda: peak,
        "linear": lambda: optax.linear_schedule(peak, 0.0, left),
        # Optax's cosine schedule does not accept a traced rate
        "cosine": lambda: (
            lambda count: peak * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / left, 1.0)))
        ),
    }[config.lr_schedule]()
    if not warmup:
        return after
    later: Any = after if callable(after) else optax.constant_schedule(after)
    rising: Any = lambda count: peak * (count + 1) / warmup  # the first rate is not 0
    return optax.join_schedules([rising, later], [warmup])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by the global norm, then the configured rule and schedule.

    With `critic_lr` the critic's parameters have their own learning rate. A separate
    critic is clipped separately: its first gradients are large and would scale down the
    policy's. Raises UserError for an unknown rule.
    """
    if config.optimizer not in RULES:
        raise UserError(f"--optimizer {config.optimizer!r}: choose one of {', '.join(RULES)}")
    rule = lambda rate: (
        RULES[config.optimizer](config),
        optax.scale_by_learning_rate(schedule(config, rate)),
    )
    # 0 is no clipping, as in transformers and TRL; a sweep's norm is traced
    most = jnp.where(jnp.equal(config.max_grad_norm, 0), jnp.inf, config.max_grad_norm)
    clip = optax.clip_by_global_norm(most)
    separate = config.critic == "separate"
    if config.critic_lr is None and not separate:
        return optax.chain(clip, *rule(config.lr))
    own = (clip,) if separate else ()
    critic_lr = config.lr if config.critic_lr is None else config.critic_lr
    rules: dict[Hashable, optax.GradientTransformation] = {
        "policy": optax.chain(*own, *rule(config.lr)),
        "critic": optax.chain(*own, *rule(critic_lr)),
    }
    both = optax.multi_transform(rules, label_params)
    return both if separate else optax.chain(clip, both)


def label_params(params: Params) -> PyTree:
    """ "critic" for every parameter of the critic, "policy" for the others.

    >>> label_params({"embed": 1, "value": {"kernel": 2}, "critic": {"embed": 3}})
    {'embed': 'policy', 'value': {'kernel': 'critic'}, 'critic': {'embed': 'critic'}}
    """
    label = lambda name: "critic" if name in CRITIC else "policy"
    return {name: jax.tree.map(lambda _, n=name: label(n), x) for name, x in params.items()}


def zero_policy(tree: Any, critic_alone: Any) -> Any:
    """Gradients or updates with 0 for the policy's leaves where `critic_alone` is
    true.
    """
    zero = lambda x: jnp.where(critic_alone, jnp.zeros_like(x), x)
    return jax.tree.map(lambda n, x: x if n == "critic" else zero(x), label_params(tree), tree)
