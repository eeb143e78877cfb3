"""Updates on samples of an older policy.

Question   Every row is trained on once, in minibatches of 16. How much is lost if more minibatches
           are sampled before the first update? With 16 updates a batch a row is up to 15 updates
           old, and half of that on average. The metric is the reward of the final policy; all arms
           make the same number of updates (320 at --scale ladder).
Paper      Asynchronous RLHF, https://arxiv.org/abs/2410.18252
Changed    The first metric was the reward of all steps, of which one arm had only five. That record
           is withdrawn.
Command    python experiments/ablations/staleness.py
Found      1 minutes at --scale ladder on a core that other work shared.
           rows up to 15 updates old cost the policy reward: disagrees (reward of the trained policy
           -.072, 95 % interval -.091 to -.054).
           rows up to 63 updates old cost the policy reward: agrees (reward of the trained policy
           +.420, 95 % interval +.391 to +.449).
           9 minutes at --scale small on a core that other work shared.
           rows up to 15 updates old cost the policy reward: not decided (reward of the trained
           policy -.026, 95 % interval -.058 to +.005).
           rows up to 63 updates old cost the policy reward: not decided (reward of the trained
           policy -.018, 95 % interval -.048 to +.012).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

PAPER = "https://arxiv.org/abs/2410.18252"
LATER = {
    f"{updates} update{'s' * (updates > 1)} a batch": updates for updates in (1, 4, 16, 64)
}  # of 16 rows each
QUESTION = Question(
    "staleness",
    # not whitened: the mean and the deviation would be of 16 rows in one arm and of 1,024 in
    # another
    {
        name: Arm(
            {"batch_size": 16 * n, "minibatches": n, "whiten_advantages": False},
            times={"steps": 4 / n},
        )
        for name, n in LATER.items()
    },
    (
        Claim(
            "rows up to 15 updates old cost the policy reward",
            PAPER,
            "1 update a batch",
            "16 updates a batch",
            "score",
        ),
        Claim(
            "rows up to 63 updates old cost the policy reward",
            PAPER,
            "1 update a batch",
            "64 updates a batch",
            "score",
        ),
    ),
    ("end", "score"),
)


def main(options: AblationConfig) -> None:
    run(
        QUESTION, options, small={"steps": 48}
    )  # a multiple of 16, so that all have equally many updates


if __name__ == "__main__":
    cli.script(main, AblationConfig)
