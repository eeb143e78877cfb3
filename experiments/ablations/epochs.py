"""Epochs and minibatches against fresh samples.

Question   How often may the same rollouts be learned from, and in how small parts?
Paper      https://arxiv.org/abs/2006.05990 (what matters in on-policy reinforcement learning).
Command    python experiments/ablations/epochs.py
Found      6 minutes at --scale ladder on a core that other work shared.
           several passes over the samples beat one: agrees (reward of all steps +.202, 95 % interval +.179 to +.224).
           minibatches beat one update a batch: agrees (reward of all steps +.235, 95 % interval +.220 to +.251).
"""

from scales import AblationConfig, Arm, Claim, Question, run

from jaxppo import cli

PAPER = "https://arxiv.org/abs/2006.05990"
QUESTION = Question(
    "epochs",
    {
        f"{epochs} x {minibatches}": Arm({"epochs": epochs, "minibatches": minibatches})
        for epochs, minibatches in ((1, 1), (1, 4), (1, 16), (4, 4), (8, 4))
    },
    (
        Claim("several passes over the samples beat one", PAPER, "4 x 4", "1 x 4", "area"),
        Claim("minibatches beat one update a batch", PAPER, "1 x 4", "1 x 1", "area"),
    ),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options, smollm2={"arms": ("1 x 1", "1 x 4", "4 x 4")})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
