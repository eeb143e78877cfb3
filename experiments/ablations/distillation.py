"""Distillation on the student's own samples, against the teacher's.

Question   At equal numbers of samples and steps, is more learned from a teacher that reads the
           student's samples than from responses that the teacher writes? With a KL the teacher
           gives its whole distribution on each token; without, one token's log-prob, or the token
           alone. No arm has a reward. At --scale ladder the teacher was trained by PPO on the
           one task, and a student is new; at --scale small the teacher had twice the student's
           supervised steps.
Paper      GKD, https://arxiv.org/abs/2306.13649; one log-prob a token as a reward:
           https://thinkingmachines.ai/blog/on-policy-distillation
Command    python experiments/ablations/distillation.py
Found      3 minutes at --scale ladder on a core that other work shared.
           a reward on own samples teaches more than imitation of the teacher's: disagrees (reward
           of the trained policy -.118, 95 % interval -.137 to -.099).
           the reverse KL on own samples does, too: not decided (reward of the trained policy -.002,
           95 % interval -.024 to +.019).
           and more than the forward KL on the teacher's: not decided (reward of the trained policy
           -.003, 95 % interval -.026 to +.020).
           the reverse KL teaches more than a reward: agrees (reward of the trained policy +.115, 95
           % interval +.103 to +.128).
           5 minutes at --scale small on a core that other work shared.
           a reward on own samples teaches more than imitation of the teacher's: disagrees (reward
           of the trained policy -.056, 95 % interval -.091 to -.020).
           the reverse KL on own samples does, too: agrees (reward of the trained policy +.136, 95 %
           interval +.113 to +.159).
           and more than the forward KL on the teacher's: agrees (reward of the trained policy
           +.128, 95 % interval +.104 to +.153).
           the reverse KL teaches more than a reward: agrees (reward of the trained policy +.191, 95
           % interval +.158 to +.225).
"""

import jax.numpy as jnp
from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question


def teacher_samples(model):
    """The teacher's parameters while decoding; what the scorer computes stays. A column more, which
    makes their width odd, marks the teacher's hidden states.
    """

    def apply(params, tokens, attend, *, cache=None, **rest):
        if cache is None:
            return model.apply(params, tokens, attend, **rest)
        hidden, cache = model.apply(params["teacher"], tokens, attend, cache=cache, **rest)
        return jnp.pad(hidden, ((0, 0), (0, 0), (0, 1))), cache

    def logits(params, hidden):
        if hidden.shape[-1] % 2:
            return model.logits(params["teacher"], hidden[..., :-1])
        return model.logits(params, hidden)

    return model._replace(apply=apply, logits=logits)


def unrewarded(parts):
    """No reward but the teacher's."""
    return parts._replace(token_rewards=lambda scores, rolled, **_: jnp.zeros_like(rolled.mask))


def imitation(parts):
    """The log-likelihood of the samples: every token has the reward 1, and gamma is 0."""
    return parts._replace(token_rewards=lambda scores, rolled, **_: rolled.mask, teacher=None)


GKD = "https://arxiv.org/abs/2306.13649"
BLOG = "https://thinkingmachines.ai/blog/on-policy-distillation"
DISTIL = {"algorithm": "distil", "teacher": "of the scale"}
QUESTION = Question(
    "distillation",
    {
        "teacher's samples": Arm(DISTIL, imitation, teacher_samples),
        "teacher's samples, forward KL": Arm(
            {**DISTIL, "distil": "forward"}, unrewarded, teacher_samples
        ),
        "own samples, reward": Arm(DISTIL, unrewarded),
        "own samples, reverse KL": Arm({**DISTIL, "distil": "reverse"}, unrewarded),
    },
    (
        Claim(
            "a reward on own samples teaches more than imitation of the teacher's",
            BLOG,
            "own samples, reward",
            "teacher's samples",
            "score",
        ),
        Claim(
            "the reverse KL on own samples does, too",
            GKD,
            "own samples, reverse KL",
            "teacher's samples",
            "score",
        ),
        Claim(
            "and more than the forward KL on the teacher's",
            GKD,
            "own samples, reverse KL",
            "teacher's samples, forward KL",
            "score",
        ),
        Claim(
            "the reverse KL teaches more than a reward",
            "",
            "own samples, reverse KL",
            "own samples, reward",
            "score",
        ),
    ),
    ("score",),
)


def main(options: AblationConfig) -> None:
    run(
        QUESTION,
        options,
        ladder={"tasks": ("prompt",), "teacher": 160, "steps": 40},
        small={"teacher": 240, "lr": 5e-4},  # the rate of experiments/distil.py
    )


if __name__ == "__main__":
    cli.script(main, AblationConfig)
