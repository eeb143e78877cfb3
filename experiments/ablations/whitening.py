"""Whitening of advantages and rewards: over the batch, over a group, or not at all.

Question   Does it matter which numbers get mean 0 and variance 1?
Paper      https://arxiv.org/abs/2005.12729 (implementation matters in deep policy gradients); REINFORCE++,
           https://arxiv.org/abs/2501.03262.
Command    python experiments/ablations/whitening.py
"""

from scales import AblationConfig, Arm, Claim, Question, run

from jaxppo import cli

FREE = {"value_loss": "none", "group_size": 8}
QUESTION = Question(
    "whitening",
    {
        "advantages over the batch": Arm({"whiten_advantages": True}),
        "not at all": Arm({"whiten_advantages": False}),
        "scale alone": Arm({"whiten_advantages": True, "whiten_shift": False}),
        "scores over the batch": Arm({"whiten_advantages": False, "reward_norm": "batch"}),
        "scores over their running deviation": Arm({"whiten_advantages": False, "reward_norm": "running"}),
        "each group": Arm({**FREE, "advantage": "group"}),
        "group's mean, batch's deviation": Arm({**FREE, "advantage": "reinforce_plus_plus_baseline"}),
    },
    (
        Claim(
            "whitened advantages beat plain ones", "https://arxiv.org/abs/2005.12729", "advantages over the batch", "not at all",
            "area",
        ),
        Claim(
            "the batch's deviation beats each group's own", "https://arxiv.org/abs/2501.03262", "group's mean, batch's deviation",
            "each group", "area",
        ),
    ),
)  # fmt: skip


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
