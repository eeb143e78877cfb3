"""The tables name -> function: the only place where a name on the command line becomes
a function. One line each.

Presets, which choose a name from each table, stand in `presets.ALGORITHMS`.
"""

import inspect
from collections.abc import Callable
from functools import partial

from jaxppo import aggregate, estimators, kl, second_order, update
from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.losses import covariance, sequence, shared, token, value
from jaxppo.rewards.shaping import token_rewards
from jaxppo.types import AdvantageFn, Parts, PolicyLossFn, RewardFn


def with_clip(loss: Callable) -> Callable[[Config], Callable]:
    """A loss with bounds; what the settings leave open keeps the loss's own default."""
    given = lambda c: {"low": c.clip_low, "high": c.clip_high}
    return lambda c: partial(loss, **{name: x for name, x in given(c).items() if x is not None})


POLICY_LOSSES: dict[str, Callable[[Config], Callable]] = {
    "reinforce": lambda c: token.reinforce,
    "clip": with_clip(token.clip),
    "dual_clip": with_clip(token.dual_clip),
    "kl_penalty": lambda c: token.kl_penalty,  # beta comes from the controller
    "gspo": with_clip(sequence.gspo),
    "gspo_token": with_clip(sequence.gspo_token),
    "cispo": with_clip(token.cispo),
    "sapo": lambda c: token.sapo,
    "gmpo": with_clip(sequence.gmpo),
    "clip_cov": with_clip(covariance.clip_cov),
    "kl_cov": lambda c: covariance.kl_cov,
    "dppo_tv": with_clip(token.dppo_tv),
    "dppo_kl": with_clip(token.dppo_kl),
    "awr": lambda c: token.awr,
    "dro": lambda c: partial(token.dro, beta=c.beta),
}

ADVANTAGES: dict[str, Callable[[Config], AdvantageFn]] = {
    "gae": estimators.gae,
    "returns": estimators.monte_carlo,
    "moving_average": estimators.moving_average,
    "batch_mean": estimators.on_rows(estimators.batch_mean),
    "group": estimators.on_rows(estimators.group),
    "group_mean": estimators.on_rows(estimators.group_mean),
    "rloo": estimators.on_rows(estimators.rloo),
    "opo": estimators.on_rows(estimators.opo),
    "gpg": estimators.on_rows(estimators.gpg),
    "gdpo": estimators.gdpo,
    "remax": estimators.remax,
    "reinforce_plus_plus": estimators.reinforce_plus_plus,
    "reinforce_plus_plus_baseline": estimators.on_rows(estimators.group_mean, whiten=True),
}

AGGREGATES: dict[str, Callable] = {
    "token_mean": lambda c: aggregate.token_mean,
    "token_sum": lambda c: aggregate.token_sum,
    "sequence_mean": lambda c: aggregate.sequence_mean,
    "sequence_sum": lambda c: aggregate.sequence_sum,
    "constant": lambda c: partial(aggregate.constant, length=c.response_length),
}

KLS: dict[str, Callable] = {
    "k1": kl.k1,
    "k2": kl.k2,
    "k3": kl.k3,
    "absolute": kl.absolute,
    "k1+": lambda x, ref: kl.straight_through(kl.k1(x, ref), kl.k2(x, ref)),
    "k3+": lambda x, ref: kl.straight_through(kl.k3(x, ref), kl.k2(x, ref)),
    "absolute+": lambda x, ref: kl.straight_through(kl.absolute(x, ref), kl.k2(x, ref)),
    "full": kl.full,  # the one estimator on logits: the step computes them
}

VALUE_LOSSES: dict[str, Callable] = {
    "mse": lambda c: lambda values, old_values, returns: value.value_mse(values, returns),
    "clipped": lambda c: partial(value.value_clipped, eps=c.value_clip),
    "huber": lambda c: lambda values, old_values, returns: value.value_huber(values, returns),
    "none": lambda c: None,
}

CORRECTIONS: dict[str, Callable | None] = {"none": None, "truncated": shared.truncated_importance}

UPDATES: dict[str, Callable] = {
    "gradient": update.make_update,
    "trpo": second_order.trpo,
    "npg": second_order.npg,
}


def look_up(table: dict, kind: str, name: str):
    """table[name], or a UserError that names the choices."""
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}: choose one of {', '.join(table)}")
    return table[name]


def check(config: Config) -> None:
    """Raise UserError for a name that is in no table."""
    make_parts(config, lambda params, rollout: (rollout.mask.sum(1), rollout.finished))


def make_parts(config: Config, reward: RewardFn) -> Parts:
    """The parts that the configuration names, with this reward."""
    make_update = look_up(UPDATES, "update", config.update)
    return Parts(
        reward=reward,
        token_rewards=token_rewards,
        advantage=look_up(ADVANTAGES, "advantage", config.advantage)(config),
        policy_loss=policy_loss(config),
        aggregate=look_up(AGGREGATES, "aggregate", config.aggregate)(config),
        kl=look_up(KLS, "kl", config.kl),
        value_loss=look_up(VALUE_LOSSES, "value-loss", config.value_loss)(config),
        correction=look_up(CORRECTIONS, "correction", config.correction),
        update=make_update if config.old_logprobs == "sampler" else update.rescored(make_update),
        greedy=config.advantage == "remax",
        penalty=config.loss == "kl_penalty",
    )


def policy_loss(config: Config) -> PolicyLossFn:
    """The named policy loss with the settings that were given for it. Raises UserError
    for a setting that it does not have.
    """
    loss = look_up(POLICY_LOSSES, "loss", config.loss)(config)
    if not config.loss_settings:
        return loss
    known = [
        name
        for name, x in inspect.signature(loss).parameters.items()
        if x.kind is x.KEYWORD_ONLY and name != "key"
    ]
    for name, _ in config.loss_settings:
        if name not in known:
            raise UserError(
                f"--loss {config.loss} has no setting {name!r}: choose from {', '.join(known) or 'none'}"
            )
    return partial(loss, **dict(config.loss_settings))
