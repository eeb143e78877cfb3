"""Algorithms as sets of settings, chosen by `--algorithm NAME`. Other options override
them.

A preset names its parts (`algorithms.py` maps names to functions) and the settings that
define the algorithm. Each published recipe at the end also has the learning rates,
sizes and coefficients of its publication, which were made for large models and batches.
"""

import dataclasses
import re
from typing import Any, NamedTuple, TypeVar

from jaxppo.errors import UserError

C = TypeVar("C")


class Preset(NamedTuple):
    """One algorithm."""

    about: str  # one line
    paper: str  # where it is defined
    settings: dict[str, Any]  # fields of `config.Config`


CRITIC_FREE = {"value_loss": "none"}
ONE_PASS = {"epochs": 1, "minibatches": 1}
GROUPS = {**CRITIC_FREE, "group_size": 8}
K3_IN_LOSS = {"kl": "k3", "kl_place": "loss", "kl_coef": 0.04, "kl_adaptive": False}
NO_KL = {"kl_coef": 0.0, "kl_adaptive": False}

DAPO = {
    "loss": "clip", "clip_low": 0.2, "clip_high": 0.28, "advantage": "group",
    "aggregate": "token_mean", "filter_groups": True, **GROUPS, **NO_KL,
}  # fmt: skip

ALGORITHMS: dict[str, Preset] = {
    "reinforce": Preset(
        "return-to-go times the gradient of the log-probability, one update a batch",
        "https://doi.org/10.1007/BF00992696",
        {
            "loss": "reinforce", "advantage": "returns", "aggregate": "sequence_sum",
            **CRITIC_FREE, **ONE_PASS,
        },
    ),
    "reinforce_baseline": Preset(
        "REINFORCE with a moving average of earlier returns as baseline",
        "https://doi.org/10.1007/BF00992696",
        {
            "loss": "reinforce", "advantage": "moving_average", "aggregate": "sequence_sum",
            **CRITIC_FREE, **ONE_PASS,
        },
    ),
    "a2c": Preset(
        "returns minus the critic's values, one update a batch",
        "https://arxiv.org/abs/1602.01783",
        {
            "loss": "reinforce", "advantage": "gae", "lam": 1.0, "whiten_advantages": False,
            "value_loss": "mse", "value_coef": 1.0, "entropy_coef": 0.01,
            "aggregate": "token_mean", **ONE_PASS,  # their .5 is of a loss without the 1/2
        },
    ),
    "ppo": Preset(
        "clipped ratios, GAE, a critic on the policy's trunk",
        "https://arxiv.org/abs/1707.06347",
        {"loss": "clip", "advantage": "gae", "aggregate": "token_mean", "value_loss": "clipped"},
    ),
    "ppo_kl": Preset(
        "PPO with a KL penalty to the old policy instead of the clip, its weight adapted",
        "https://arxiv.org/abs/1707.06347",
        {
            "loss": "kl_penalty", "advantage": "gae", "aggregate": "token_mean",
            "value_loss": "mse", "beta": 1.0, "beta_target": 0.01, "epochs": 4,
        },
    ),
    "trpo": Preset(
        "natural gradient within a KL bound, halved until it holds",
        "https://arxiv.org/abs/1502.05477",
        {
            "update": "trpo", "advantage": "gae", "aggregate": "token_mean", "value_loss": "mse",
            "epochs": 4,
        },
    ),
    "npg": Preset(
        "natural gradient without the line search",
        "https://papers.nips.cc/paper/2073-a-natural-policy-gradient",
        {
            "update": "npg", "advantage": "gae", "aggregate": "token_mean", "value_loss": "mse",
            "epochs": 4,
        },
    ),
    "rloo": Preset(
        "REINFORCE with the mean of the group's other scores as baseline",
        "https://arxiv.org/abs/2402.14740",
        {
            "loss": "reinforce", "advantage": "rloo", "aggregate": "sequence_sum", **CRITIC_FREE,
            "group_size": 4, **ONE_PASS,
        },
    ),
    "rloo_clip": Preset(
        "RLOO with PPO's clip on the ratio of the whole sequence, as in TRL",
        "https://arxiv.org/abs/2402.14740",
        {
            "loss": "rloo_clip", "advantage": "rloo", "aggregate": "sequence_mean",
            **CRITIC_FREE, "group_size": 4,
        },
    ),
    "remax": Preset(
        "REINFORCE with the score of the greedy response as baseline",
        "https://arxiv.org/abs/2310.10505",
        {
            "loss": "reinforce", "advantage": "remax", "aggregate": "token_mean", **CRITIC_FREE,
            **ONE_PASS,
        },
    ),
    "reinforce_plus_plus": Preset(
        "returns-to-go whitened over the batch, PPO's clip",
        "https://arxiv.org/abs/2501.03262",
        {
            "loss": "clip", "advantage": "reinforce_plus_plus", "aggregate": "token_mean",
            **CRITIC_FREE,
        },
    ),
    "reinforce_plus_plus_baseline": Preset(
        "REINFORCE++ with the group's mean as baseline, KL as k2 in the loss",
        "https://arxiv.org/abs/2501.03262",
        {
            "loss": "clip", "advantage": "reinforce_plus_plus_baseline",
            "aggregate": "token_mean", **GROUPS, "kl": "k2", "kl_place": "loss",
            "kl_adaptive": False,
        },
    ),
    "grpo": Preset(
        "scores normalised in their group, PPO's clip, k3 in the loss",
        "https://arxiv.org/abs/2402.03300",
        {
            "loss": "clip", "advantage": "group", "aggregate": "sequence_mean", **GROUPS,
            **K3_IN_LOSS,
        },
    ),
    "dr_grpo": Preset(
        "GRPO without the standard deviation and the lengths as denominators",
        "https://arxiv.org/abs/2503.20783",
        {"loss": "clip", "advantage": "group_mean", "aggregate": "constant", **GROUPS, **NO_KL},
    ),
    "dapo": Preset(
        "GRPO with a higher upper clip, token mean, no KL, uninformative groups dropped",
        "https://arxiv.org/abs/2503.14476",
        DAPO,
    ),
    "gspo": Preset(
        "GRPO with one ratio for the whole sequence",
        "https://arxiv.org/abs/2507.18071",
        {"loss": "gspo", "advantage": "group", "aggregate": "sequence_mean", **GROUPS, **NO_KL},
    ),
    "luspo": Preset(
        "GSPO with the sum over a sequence's tokens: long responses do not count less a token",
        "https://arxiv.org/abs/2602.05261",
        {"loss": "gspo", "advantage": "group", "aggregate": "sequence_sum", **GROUPS, **NO_KL},
    ),
    "vespo": Preset(
        "GRPO with a soft weight of the whole sequence's ratio instead of the clip",
        "https://arxiv.org/abs/2602.10693",
        {"loss": "vespo", "advantage": "group", "aggregate": "token_mean", **GROUPS, **NO_KL},
    ),
    "cispo": Preset(
        "clipped importance weights that keep every token's gradient",
        "https://arxiv.org/abs/2506.13585",
        {"loss": "cispo", "advantage": "group", "aggregate": "token_mean", **GROUPS, **NO_KL},
    ),
    "gmpo": Preset(
        "GRPO with the geometric mean of clipped ratios",
        "https://arxiv.org/abs/2507.20673",
        {"loss": "gmpo", "advantage": "group", "aggregate": "sequence_mean", **GROUPS, **NO_KL},
    ),
    "sapo": Preset(
        "GRPO with a soft gate instead of the clip",
        "https://arxiv.org/abs/2511.20347",
        {"loss": "sapo", "advantage": "group", "aggregate": "sequence_mean", **GROUPS, **NO_KL},
    ),
    "vapo": Preset(
        "PPO with lambda 1 for the critic, a length-adaptive lambda, a higher upper clip, "
        "and the likelihood of right answers",
        "https://arxiv.org/abs/2504.05118",
        {
            "loss": "clip", "clip_low": 0.2, "clip_high": 0.28, "advantage": "gae",
            "critic_lam": 1.0, "lam_alpha": 0.05, "aggregate": "token_mean",
            "value_loss": "clipped", "critic": "separate", "critic_warmup": 5,
            "likelihood_coef": 0.1, **NO_KL,
        },
    ),
    "sao": Preset(
        "PPO as in VAPO, with one ratio to the sampler that masks tokens on either side "
        "(one critic update a step, all of the critic trained)",
        "https://arxiv.org/abs/2607.07508",
        {
            "loss": "two_sided", "advantage": "gae", "critic_lam": 1.0, "lam_alpha": 0.05,
            "aggregate": "token_mean", "value_loss": "clipped", "critic": "separate",
            "critic_warmup": 10, **NO_KL,
        },
    ),
    "opo": Preset(
        "on-policy, with the group's length-weighted mean as baseline",
        "https://arxiv.org/abs/2505.23585",
        {
            "loss": "reinforce", "advantage": "opo", "aggregate": "token_mean", **GROUPS,
            **NO_KL, **ONE_PASS,
        },
    ),
    "gpg": Preset(
        "plain policy gradient on group differences, scaled up for uninformative groups",
        "https://arxiv.org/abs/2504.02546",
        {
            "loss": "reinforce", "advantage": "gpg", "aggregate": "token_mean", **GROUPS,
            **NO_KL, **ONE_PASS,
        },
    ),
    "max_rl": Preset(
        "score differences over the group's mean: the rarer a right answer, the more it counts",
        "https://arxiv.org/abs/2602.02710",
        {
            "loss": "reinforce", "advantage": "max_rl", "aggregate": "sequence_sum", **GROUPS,
            **NO_KL, **ONE_PASS,
        },
    ),
    "gdpo": Preset(
        "several rewards, each normalised in its group before they are summed",
        "https://arxiv.org/abs/2601.05242",
        {
            "loss": "clip", "advantage": "gdpo", "aggregate": "sequence_mean", **GROUPS,
            **K3_IN_LOSS,
        },
    ),
    "distil": Preset(
        "on-policy distillation: each token's log-prob under a teacher minus the policy's own, "
        "which --teacher gives (no reward needed)",
        "https://arxiv.org/abs/2306.13649",
        {
            "loss": "reinforce", "advantage": "returns", "gamma": 0.0, "distil": "reward",
            "aggregate": "token_mean", **CRITIC_FREE, **NO_KL, **ONE_PASS,
        },
    ),
    "awr": Preset(
        "imitation of the responses, weighted by the exponential of their whitened advantage",
        "https://arxiv.org/abs/1910.00177",
        {
            "loss": "awr", "advantage": "gae", "whiten_advantages": True,
            "aggregate": "token_mean", "value_loss": "mse",
        },
    ),
    "nlpo": Preset(
        "PPO that samples from the top-p tokens of a lagged copy of the policy",
        "https://arxiv.org/abs/2210.01241",
        {
            "loss": "clip", "advantage": "gae", "aggregate": "token_mean", "value_loss": "mse",
            "mask_top_p": 0.9, "mask_every": 20,
        },
    ),
    # Published recipes, for full training: learning rates far too low for adapters
    "n_plus_tldr": Preset(
        "PPO as in the TL;DR summarisation reproduction",
        "https://arxiv.org/abs/2403.17031",
        {
            "loss": "clip", "advantage": "gae", "aggregate": "token_mean",
            "value_loss": "clipped", "value_coef": 0.1, "lr": 3e-6, "lr_schedule": "linear",
            "adam_eps": 1e-5, "kl_coef": 0.05, "kl_adaptive": False, "epochs": 4,
            "minibatches": 1, "batch_size": 512, "temperature": 0.7, "response_length": 53,
            "lam": 0.95, "missing_eos_score": -1.0, "critic": "separate", "value_init": "reward",
            "lora": 0,
        },
    ),
    "ziegler": Preset(
        "PPO as in Ziegler et al. 2019",
        "https://arxiv.org/abs/1909.08593",
        {
            "loss": "clip", "advantage": "gae", "aggregate": "token_mean",
            "value_loss": "clipped", "value_coef": 0.1, "lr": 1e-5, "adam_eps": 1e-5,
            "kl_coef": 0.15, "kl_adaptive": True, "kl_target": 6.0, "kl_horizon": 10_000.0,
            "epochs": 4, "minibatches": 1, "batch_size": 512, "temperature": 0.7,
            "response_length": 24, "lam": 0.95, "whiten_rewards": True, "reward_reference": 512,
            "lora": 0,
        },
    ),
    "verl_ppo": Preset(
        "PPO with verl's defaults: dual clip, lambda 1, a separate critic",
        "https://arxiv.org/abs/2409.19256",
        {
            "loss": "dual_clip", "advantage": "gae", "lam": 1.0, "aggregate": "token_mean",
            "value_loss": "clipped", "value_clip": 0.5, "optimizer": "adamw", "adam_eps": 1e-8,
            "lr": 1e-6, "critic": "separate", "critic_lr": 1e-5, "lr_schedule": "constant",
            **NO_KL, "whiten_ddof": 1, "lora": 0,
        },
    ),
    "rl4lms_ppo": Preset(
        "PPO as in RL4LMs on IMDB",
        "https://arxiv.org/abs/2210.01241",
        {
            "loss": "clip", "advantage": "gae", "aggregate": "token_mean", "value_loss": "mse",
            "value_coef": 1.0, "gamma": 0.99, "lam": 0.95, "lr": 1e-6, "lr_schedule": "constant",
            "adam_eps": 1e-8, "max_grad_norm": 0.5, "epochs": 5, "minibatches": 20,
            "batch_size": 1280, "kl_coef": 0.1, "kl_target": 4.8, "prompt_length": 64,
            "response_length": 48, "lora": 0,
        },
    ),
}  # fmt: skip

ALGORITHMS["rl4lms_nlpo"] = Preset(
    "NLPO as in RL4LMs: log-probs are not renormalised over the mask, which is refreshed "
    "every 20 steps",
    "https://arxiv.org/abs/2210.01241",
    {
        **ALGORITHMS["rl4lms_ppo"].settings, "mask_top_p": 0.9, "mask_every": 20,
        "mask_renormalise": False,
    },
)  # fmt: skip


def preset(config: C, name: str) -> C:
    """Set the settings of one algorithm. Raises UserError for an unknown name.

    >>> from jaxppo.config import Config
    >>> chosen = preset(Config(steps=3), "rloo")
    >>> chosen.algorithm, chosen.advantage, chosen.steps
    ('rloo', 'rloo', 3)
    """
    if name not in ALGORITHMS:
        raise UserError(f"unknown --algorithm {name!r}: choose one of {', '.join(ALGORITHMS)}")
    settings = ALGORITHMS[name].settings
    return dataclasses.replace(config, algorithm=name, **settings)  # pyright: ignore[reportArgumentType]


def describe(config: Any, functions: str = "") -> str:
    """The algorithm of a config and its settings; where they are not the preset's, with
    the preset's in brackets. `functions` are those of `RunConfig.functions`: a part
    that the user replaced stands instead of its setting.

    >>> from jaxppo.config import Config
    >>> describe(
    ...     Config(algorithm="reinforce", epochs=2), "reward r@a1, policy_loss mine@b2"
    ... )
    'reinforce: loss mine@b2 (preset: reinforce), advantage returns, aggregate
    sequence_sum, value_loss none, epochs 2 (preset: 1), minibatches 1'
    """
    given = dict(re.findall(r"(\w+) (\S+?)(?:, |$)", functions))
    given = {name.removeprefix("policy_"): x for name, x in given.items() if name != "reward"}
    settings, words = ALGORITHMS[config.algorithm].settings, []
    for name in {**settings, **given}:
        own, usual = given.get(name) or getattr(config, name), settings.get(name, "none")
        words.append(f"{name} {own}" + f" (preset: {usual})" * (own != usual))
    return f"{config.algorithm}: {', '.join(words)}"
