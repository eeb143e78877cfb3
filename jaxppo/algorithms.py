"""The tables name -> function: the only place where a name on the command line becomes a function. One line each."""

from collections.abc import Callable
from functools import partial

from jaxppo import advantages, aggregate, kl, losses, masked
from jaxppo.config import Config, UserError
from jaxppo.rewards.shaping import token_rewards
from jaxppo.types import AdvantageFn, Parts, RewardFn


def gae(config: Config) -> AdvantageFn:
    """GAE on the critic's values, whitened over the global batch."""

    def advantage(rewards, scores, rollout, *, valid, statistics, axis_name=None):
        mask = rollout.mask * valid[:, None].astype(rollout.mask.dtype)
        adv, returns = advantages.gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        if config.whiten_advantages:
            adv = masked.whiten(adv, mask, axis_name=axis_name)
        return adv, returns, statistics

    return advantage


POLICY_LOSSES: dict[str, Callable] = {
    "reinforce": lambda c: losses.reinforce,
    "clip": lambda c: partial(losses.clip, low=c.clip_low, high=c.clip_high),
}
ADVANTAGES: dict[str, Callable[[Config], AdvantageFn]] = {"gae": gae}
AGGREGATES: dict[str, Callable] = {
    "token_mean": lambda c: aggregate.token_mean,
    "sequence_mean": lambda c: aggregate.sequence_mean,
    "sequence_sum": lambda c: aggregate.sequence_sum,
    "constant": lambda c: partial(aggregate.constant, length=c.response_length),
}
KLS: dict[str, Callable] = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3, "absolute": kl.absolute}
VALUE_LOSSES: dict[str, Callable] = {
    "mse": lambda c: lambda values, old_values, returns: losses.value_mse(values, returns),
    "clipped": lambda c: partial(losses.value_clipped, eps=c.value_clip),
    "none": lambda c: None,
}


def look_up(table: dict, kind: str, name: str):
    """table[name], or a UserError that names the choices."""
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}: choose one of {', '.join(table)}")
    return table[name]


def make_parts(config: Config, reward: RewardFn) -> Parts:
    """The parts that the configuration names, with this reward."""
    return Parts(
        reward=reward,
        token_rewards=token_rewards,
        advantage=look_up(ADVANTAGES, "advantage", config.advantage)(config),
        policy_loss=look_up(POLICY_LOSSES, "loss", config.loss)(config),
        aggregate=look_up(AGGREGATES, "aggregate", config.aggregate)(config),
        kl=look_up(KLS, "kl", config.kl),
        value_loss=look_up(VALUE_LOSSES, "value-loss", config.value_loss)(config),
    )
