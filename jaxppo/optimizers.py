"""How gradients become changes of the parameters: clipping, a rule, a schedule, all of
it Optax.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.types import Params, PyTree, Scalar

CRITIC = ("value", "critic")  # names below which parameters belong to the critic alone


def rule_adam(config: Config) -> optax.GradientTransformation:
    """Adam with eps 1e-5 by default (Huang et al. 2022, "The 37 implementation details
    of PPO").
    """
    return optax.scale_by_adam(eps=config.adam_eps)


def rule_adamw(config: Config) -> optax.GradientTransformation:
    """Adam, and a decay of the weights that is not scaled by its deviation
    (https://arxiv.org/abs/1711.05101).
    """
    return optax.chain(rule_adam(config), optax.add_decayed_weights(config.weight_decay))


def rule_rmsprop(config: Config) -> optax.GradientTransformation:
    """RMSProp with decay .99, as A2C's first implementation has it
    (https://arxiv.org/abs/1602.01783).
    """
    return optax.scale_by_rms(decay=0.99, eps=config.adam_eps)


def rule_sgd(config: Config) -> optax.GradientTransformation:
    """The gradient itself: gradient ascent on the return, as the textbook has it."""
    del config
    return optax.identity()


RULES: dict[str, Callable[[Config], optax.GradientTransformation]] = {
    "adam": rule_adam,
    "adamw": rule_adamw,
    "rmsprop": rule_rmsprop,
    "sgd": rule_sgd,
}


def schedule(config: Config, peak: Scalar) -> Scalar | optax.Schedule:
    """The learning rate of each update: up to `peak` in the warm-up, then constant, or
    to 0 along a line or half a cosine.
    """
    warmup = config.lr_warmup * config.epochs * config.minibatches
    left = max(config.updates - warmup, 1)
    after: Any = {
        "constant": lambda: peak,
        "linear": lambda: optax.linear_schedule(peak, 0.0, left),
        # written out: Optax's own schedule wants a rate that is not traced
        "cosine": lambda: (
            lambda count: peak * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / left, 1.0)))
        ),
    }[config.lr_schedule]()
    if not warmup:
        return after
    later: Any = after if callable(after) else optax.constant_schedule(after)
    # the first update is not lost to a rate of 0
    rising: Any = lambda count: peak * (count + 1) / warmup
    return optax.join_schedules([rising, later], [warmup])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Global-norm clipping, then the configured rule and schedule; with `critic_lr` the
    critic's parameters have their own. Those of a separate critic are clipped by
    themselves: else its first, large gradients would hold the policy back.

    Raises UserError for an unknown rule.
    """
    if config.optimizer not in RULES:
        raise UserError(f"--optimizer {config.optimizer!r}: choose one of {', '.join(RULES)}")
    one = lambda rate: (
        RULES[config.optimizer](config),
        optax.scale_by_learning_rate(schedule(config, rate)),
    )
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    apart = config.critic == "separate"
    if config.critic_lr is None and not apart:
        return optax.chain(clip, *one(config.lr))
    own = (clip,) if apart else ()
    rules: dict[Hashable, optax.GradientTransformation] = {
        "policy": optax.chain(*own, *one(config.lr)),
        "critic": optax.chain(
            *own, *one(config.lr if config.critic_lr is None else config.critic_lr)
        ),
    }
    each = optax.multi_transform(rules, labels)
    return each if apart else optax.chain(clip, each)


def labels(params: Params) -> PyTree:
    """ "critic" for every parameter of the critic alone, "policy" for the others.

    >>> labels({"embed": 1, "value": {"kernel": 2}, "critic": {"embed": 3}})
    {'embed': 'policy', 'value': {'kernel': 'critic'}, 'critic': {'embed': 'critic'}}
    """
    name = lambda path, _: "critic" if path[0].key in CRITIC else "policy"
    out = jax.tree_util.tree_map_with_path(name, dict(params))
    return {key: out[key] for key in params}


def only_critic(tree: Any, alone: Any) -> Any:
    """The tree with 0 in place of the policy's leaves where `alone` is true; of
    gradients and of updates.
    """
    keep = jax.tree.map(lambda label: label == "critic", labels(tree))
    return jax.tree.map(
        lambda x, stays: x if stays else jnp.where(alone, jnp.zeros_like(x), x), tree, keep
    )
