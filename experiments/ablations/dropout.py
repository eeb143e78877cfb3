"""Dropout in the policy during policy optimisation.

Question   Does dropout make policy optimisation unstable (RL4LMs' claim)? Sampler and scorer draw
           different masks, so the ratio is noisy from the start. The judge samples without
           dropout: what dropout costs during sampling is no loss of learning.
Paper      RL4LMs, https://arxiv.org/abs/2210.01241
Command    python experiments/ablations/dropout.py
Found      2 minutes at --scale ladder on a core that other work shared.
           without dropout a better policy is learned than with .1: not decided (reward of the
           trained policy +.020, 95 % interval -.023 to +.064).
           without dropout a better policy is learned than with .3: agrees (reward of the trained
           policy +.104, 95 % interval +.074 to +.135).
           7 minutes at --scale small on a core that other work shared.
           without dropout a better policy is learned than with .1: agrees (reward of the trained
           policy +.020, 95 % interval +.008 to +.031).
           without dropout a better policy is learned than with .3: agrees (reward of the trained
           policy +.028, 95 % interval +.015 to +.041).
"""

import jax
import jax.numpy as jnp
from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question


def dropping(rate: float):
    """A change of the model: dropout of the last hidden states, with another mask at every call."""

    def noisy(model):
        def apply(params, tokens, attend, **rest):
            hidden, cache = model.apply(params, tokens, attend, **rest)
            # numbers that change with parameters and tokens are as good as a key that is handed
            # down
            bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(hidden).sum(), jnp.int32)
            keep = jax.random.bernoulli(
                jax.random.fold_in(jax.random.key(0), bits), 1 - rate, hidden.shape
            )
            return jnp.where(keep, hidden / (1 - rate), 0.0), cache

        return model._replace(apply=apply)

    return noisy


PAPER = "https://arxiv.org/abs/2210.01241"
QUESTION = Question(
    "dropout",
    {f"{rate}": Arm(model=dropping(rate) if rate else None) for rate in (0.0, 0.1, 0.3)},
    (
        Claim(
            "without dropout a better policy is learned than with .1", PAPER, "0.0", "0.1", "score"
        ),
        Claim(
            "without dropout a better policy is learned than with .3", PAPER, "0.0", "0.3", "score"
        ),
    ),
    ("end", "area", "score", "first_ratio_off"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
