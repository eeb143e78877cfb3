"""Tables from names to functions, a line for each: here a name in the settings, such as
`--loss clip`, becomes a part of the step. (Optimizers are in `optimizers.RULES`.)

Presets, which choose a name from each table, are in `presets.ALGORITHMS`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jaxppo import advantages, aggregate, estimators, kl, optimizers, second_order, update
from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.losses import correction, covariance, sequence, token, value
from jaxppo.presets import preset
from jaxppo.rewards.shaping import token_rewards
from jaxppo.types import Parts, PolicyLossFn, RewardFn


class Choice(NamedTuple):
    """A row of a table: how the part is made from the settings, and what it needs."""

    make: Callable[[Config], Callable]
    grouped: bool = False  # compares the responses to a prompt
    greedy: bool = False  # `Parts.greedy`
    penalty: bool = False  # `Parts.penalty`


def with_clip(loss: Callable) -> Choice:
    """A loss with bounds; a bound that is not set keeps the loss's own default."""
    given = lambda c: {"low": c.clip_low, "high": c.clip_high}
    bounds = lambda c: {name: x for name, x in given(c).items() if x is not None}
    return Choice(lambda c: partial(loss, **bounds(c)))


POLICY_LOSSES = {
    "reinforce": Choice(lambda c: token.reinforce),
    "clip": with_clip(token.clip),
    "dual_clip": with_clip(token.dual_clip),
    "kl_penalty": Choice(lambda c: token.kl_penalty, penalty=True),
    "gspo": with_clip(sequence.gspo),
    "gspo_token": with_clip(sequence.gspo_token),
    "cispo": with_clip(token.cispo),
    "two_sided": with_clip(token.two_sided),
    "sapo": Choice(lambda c: token.sapo),
    "gmpo": with_clip(sequence.gmpo),
    "rloo_clip": with_clip(sequence.rloo_clip),
    "vespo": Choice(lambda c: sequence.vespo),
    "clip_cov": with_clip(covariance.clip_cov),
    "kl_cov": Choice(lambda c: covariance.kl_cov),
    "dppo_tv": with_clip(token.dppo_tv),
    "dppo_kl": with_clip(token.dppo_kl),
    "awr": Choice(lambda c: token.awr),
    "dro": Choice(lambda c: partial(token.dro, beta=c.beta)),
}

group_mean = partial(advantages.group, normalise_std=False)
ADVANTAGES = {
    "gae": Choice(estimators.gae),
    "turn_gae": Choice(estimators.turn_gae),
    "returns": Choice(estimators.monte_carlo),
    "moving_average": Choice(estimators.moving_average),
    "batch_mean": Choice(estimators.on_rows(estimators.batch_mean)),
    "group": Choice(estimators.on_rows(advantages.group), grouped=True),
    "group_mean": Choice(estimators.on_rows(group_mean), grouped=True),
    "group_over_batch": Choice(estimators.on_rows(advantages.group_over_batch), grouped=True),
    "max_rl": Choice(estimators.on_rows(advantages.max_rl), grouped=True),
    "pass_at_k": Choice(estimators.on_rows(advantages.pass_at_k), grouped=True),
    "rloo": Choice(estimators.on_rows(advantages.rloo), grouped=True),
    "opo": Choice(estimators.on_rows(advantages.opo), grouped=True),
    "gpg": Choice(estimators.on_rows(advantages.gpg), grouped=True),
    "gdpo": Choice(estimators.gdpo, grouped=True),
    "remax": Choice(estimators.remax, greedy=True),
    "reinforce_plus_plus": Choice(estimators.reinforce_plus_plus),
    "reinforce_plus_plus_baseline": Choice(
        estimators.on_rows(group_mean, whiten=True), grouped=True
    ),
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
}
FULL_KLS: dict[str, Callable] = {"full": kl.full}  # `Parts.full_kl`

DIVERGENCES: dict[str, Callable] = {  # of `Parts.divergence`
    "reward": lambda c: None,
    "reverse": lambda c: kl.full,
    "forward": lambda c: kl.forward,
    "jsd": lambda c: partial(kl.jensen_shannon, beta=c.distil_beta),
}

VALUE_LOSSES: dict[str, Callable] = {
    "mse": lambda c: lambda values, old_values, returns: value.value_mse(values, returns),
    "clipped": lambda c: partial(value.value_clipped, eps=c.value_clip),
    "huber": lambda c: lambda values, old_values, returns: value.value_huber(values, returns),
    "none": lambda c: None,
}


def importance(rule: str, level: str) -> Callable[[Config], Callable]:
    """Importance weights with the bounds of the settings."""
    return lambda c: partial(
        correction.importance,
        level=level,
        rule=rule,
        low=c.correction_low,
        high=c.correction_high,
        normalise=c.correction_normalise,
    )


CORRECTIONS: dict[str, Callable] = {
    "none": lambda c: None,
    "truncated": importance("truncate", "token"),
    "truncated_sequence": importance("truncate", "sequence"),
    "truncated_geometric": importance("truncate", "geometric"),
    "masked": importance("mask", "token"),
    "masked_sequence": importance("mask", "sequence"),
    "masked_geometric": importance("mask", "geometric"),
}


def rejection(over: str, estimator: str) -> Callable[[Config], Callable]:
    """A mask with the bounds of the settings."""
    bounds = lambda c: {"low": c.rejection_low, "high": c.rejection_high}
    return lambda c: partial(correction.rejection, over=over, estimator=estimator, **bounds(c))


REJECTIONS: dict[str, Callable] = {"none": lambda c: None} | {
    f"{over}_{estimator}": rejection(over, estimator)
    for estimator in ("k1", "k3")
    for over in ("token", "row_sum", "row_mean", "row_max")
}

UPDATES: dict[str, Callable] = {
    "gradient": update.make_update,
    "trpo": second_order.trpo,
    "npg": second_order.npg,
}


# settings that only some choices read: (setting of the choice, the choices)
READ_BY: dict[str, tuple[str, set]] = {
    **dict.fromkeys(("lam", "critic_lam"), ("advantage", {"gae", "turn_gae"})),
    "lam_alpha": ("advantage", {"gae"}),
    "baseline_decay": ("advantage", {"moving_average"}),
    **dict.fromkeys(
        ("clip_low", "clip_high"),
        (
            "loss",
            POLICY_LOSSES.keys()
            - {"reinforce", "kl_penalty", "sapo", "vespo", "kl_cov", "awr", "dro"},
        ),
    ),
    **dict.fromkeys(
        ("correction_low", "correction_high", "correction_normalise"),
        ("correction", CORRECTIONS.keys() - {"none"}),
    ),
    **dict.fromkeys(
        ("rejection_low", "rejection_high"), ("rejection", REJECTIONS.keys() - {"none"})
    ),
    "beta_target": ("loss", {"kl_penalty"}),
    "distil_beta": ("distil", {"jsd"}),
    "value_clip": ("value_loss", {"clipped"}),
    "value_coef": ("value_loss", VALUE_LOSSES.keys() - {"none"}),
    **dict.fromkeys(("kl_target", "kl_horizon"), ("kl_adaptive", {True})),
}


def without_effect(config: Config) -> list[str]:
    """Sentences about settings that are neither the defaults nor the preset's, and that
    no chosen part reads.

    >>> without_effect(Config(lam=0.9, advantage="rloo"))
    ['lam 0.9 has no effect with advantage rloo']
    """
    usual = preset(type(config)(), config.algorithm)
    return [
        f"{name} {getattr(config, name)} has no effect with {choice} {getattr(config, choice)}"
        for name, (choice, readers) in READ_BY.items()
        if getattr(config, choice) not in readers and getattr(config, name) != getattr(usual, name)
    ]


def look_up(table: dict, kind: str, name: str):
    """table[name], or a UserError that lists the choices."""
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}: choose one of {', '.join(table)}")
    return table[name]


def check(config: Config) -> None:
    """Raise UserError for names in no table, and for parts that the settings cannot
    have.
    """
    make_parts(config, lambda params, rollout: (rollout.mask.sum(1), rollout.finished))
    if config.beta != Config().beta and config.loss not in ("kl_penalty", "dro"):
        raise UserError(
            f"--beta {config.beta} is for the losses kl_penalty and dro, and --loss {config.loss} "
            "does not read it; the weight of the KL to the reference is --kl-coef"
        )
    optimizers.make_optimizer(config)


def make_parts(config: Config, reward: RewardFn) -> Parts:
    """The parts that the settings name, with this reward."""
    make_update = look_up(UPDATES, "update", config.update)
    advantage = look_up(ADVANTAGES, "advantage", config.advantage)
    if advantage.grouped and config.group_size == 1:  # it would be 0 everywhere
        raise UserError(
            f"--advantage {config.advantage} compares the responses to a prompt: "
            "give --group-size 2 or more"
        )
    return Parts(
        reward=reward,
        token_rewards=token_rewards,
        advantage=advantage.make(config),
        policy_loss=policy_loss(config),
        aggregate=look_up(AGGREGATES, "aggregate", config.aggregate)(config),
        kl=look_up(KLS | FULL_KLS, "kl", config.kl),
        value_loss=look_up(VALUE_LOSSES, "value-loss", config.value_loss)(config),
        correction=look_up(CORRECTIONS, "correction", config.correction)(config),
        rejection=look_up(REJECTIONS, "rejection", config.rejection)(config),
        update=make_update,
        greedy=advantage.greedy,
        penalty=POLICY_LOSSES[config.loss].penalty,
        full_kl=config.kl in FULL_KLS,
        divergence=look_up(DIVERGENCES, "distil", config.distil)(config),
    )


def policy_loss(config: Config) -> PolicyLossFn:
    """The policy loss that the settings name, with its `loss_settings`. Raises
    UserError for a setting that it does not have.
    """
    loss = look_up(POLICY_LOSSES, "loss", config.loss).make(config)
    parameters = inspect.signature(loss).parameters.items()
    known = [n for n, x in parameters if x.kind is x.KEYWORD_ONLY and n != "key"]
    for name, _ in config.loss_settings:
        if name not in known:
            raise UserError(
                f"--loss {config.loss} has no setting {name!r}: "
                f"choose from {', '.join(known) or 'none'}"
            )
    return partial(loss, **dict(config.loss_settings)) if config.loss_settings else loss
