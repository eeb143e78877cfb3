"""Epochs and minibatches against fresh samples.

Question   How many epochs should train on the same rollouts, and in how small minibatches; and what
           would fresh samples give instead?
Paper      https://arxiv.org/abs/2006.05990 (what matters in on-policy reinforcement learning), on
           several epochs; the other claims are ours.
Changed    The first record, without fresh samples, is withdrawn; its two claims had agreed.
Command    python experiments/ablations/epochs.py
Found      6 minutes at --scale ladder on a core that other work shared.
           several passes over the samples beat one: agrees (reward of all steps +.202, 95 %
           interval +.172 to +.232).
           minibatches beat one update a batch: agrees (reward of all steps +.235, 95 % interval
           +.209 to +.261).
           as many updates on four times the samples end higher: not decided (reward of the trained
           policy -.001, 95 % interval -.028 to +.026).
           12 minutes at --scale small on a core that other work shared.
           several passes over the samples beat one: not decided (reward of all steps +.004, 95 %
           interval -.008 to +.015).
           minibatches beat one update a batch: agrees (reward of all steps +.007, 95 % interval
           +.001 to +.013).
           as many updates on four times the samples end higher: agrees (reward of the trained
           policy +.079, 95 % interval +.055 to +.103).
           96 minutes at --scale smollm2 on a core that other work shared.
           several passes over the samples beat one: not decided (reward of all steps +.060, 95 %
           interval -.094 to +.214).
           minibatches beat one update a batch: agrees (reward of all steps +.165, 95 % interval
           +.145 to +.184).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

PAPER = "https://arxiv.org/abs/2006.05990"
QUESTION = Question(
    "epochs",
    {
        **{
            f"{epochs} x {minibatches}": Arm({"epochs": epochs, "minibatches": minibatches})
            for epochs, minibatches in ((1, 1), (1, 4), (1, 16), (4, 4), (8, 4))
        },
        "1 x 4, fresh": Arm(
            {"epochs": 1, "minibatches": 4}, times={"steps": 4}
        ),  # as many updates as 4 x 4
    },
    (
        Claim("several passes over the samples beat one", PAPER, "4 x 4", "1 x 4", "area"),
        Claim("minibatches beat one update a batch", "", "1 x 4", "1 x 1", "area"),
        Claim(
            "as many updates on four times the samples end higher",
            "",
            "1 x 4, fresh",
            "4 x 4",
            "score",
        ),
    ),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options, smollm2={"arms": ("1 x 1", "1 x 4", "4 x 4")})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
