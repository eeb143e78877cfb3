"""The KL to the reference: where it enters and how it is estimated.

Question   Which estimator of the KL, in the reward or in the loss, holds the policy near the
           reference, at the same coefficient and with advantages that are not whitened?
Paper      Schulman 2020, http://joschu.net/blog/kl-approx.html; on the gradients:
           https://arxiv.org/abs/2510.01555.
Changed    The first claim on k1 in the reward was: less KL than with k2 in the loss. It was changed
           after that result. That record is withdrawn: its advantages were whitened, which rescales
           the coefficient.
Command    python experiments/ablations/kl.py
Found      6 minutes at --scale ladder on a core that other work shared.
           k1 in the loss does not hold the policy, k2 does: agrees (nats to the reference +6.497,
           95 % interval +5.946 to +7.048).
           k3 in the loss holds it less than k2: agrees (nats to the reference +.391, 95 % interval
           +.330 to +.452).
           k1 in the reward holds it: less KL than without: agrees (nats to the reference +7.183, 95
           % interval +6.990 to +7.376).
           k1 in the loss holds it when it carries the ratio: agrees (nats to the reference +6.589,
           95 % interval +6.068 to +7.110).
           13 minutes at --scale small on a core that other work shared.
           k1 in the loss does not hold the policy, k2 does: not decided (nats to the reference
           +.012, 95 % interval -.013 to +.036).
           k3 in the loss holds it less than k2: not decided (nats to the reference -.004, 95 %
           interval -.020 to +.012).
           k1 in the reward holds it: less KL than without: agrees (nats to the reference +.019, 95
           % interval +.016 to +.023).
           k1 in the loss holds it when it carries the ratio: not decided (nats to the reference
           +.009, 95 % interval -.010 to +.027).
           55 minutes at --scale smollm2 on a core that other work shared.
           k1 in the reward holds it: less KL than without: agrees (nats to the reference +16.751,
           95 % interval +9.686 to +23.815).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

PAPER = "https://arxiv.org/abs/2510.01555"
# Advantages stay as they are: whitened, they would carry a coefficient of the reward's scale, and
# the loss another one.
ALIKE = {"kl_coef": 0.1, "whiten_advantages": False}
REWARD, LOSS = {**ALIKE, "kl_place": "reward"}, {**ALIKE, "kl_place": "loss"}
QUESTION = Question(
    "kl",
    {
        "none": Arm({**LOSS, "kl": "k2", "kl_coef": 0.0}),
        "k1 in the reward": Arm({**REWARD, "kl": "k1"}),
        "k3 in the reward": Arm({**REWARD, "kl": "k3"}),
        "k1 in the loss": Arm({**LOSS, "kl": "k1"}),
        "k2 in the loss": Arm({**LOSS, "kl": "k2"}),
        "k3 in the loss": Arm({**LOSS, "kl": "k3"}),
        "k1 in the loss, times the ratio": Arm({**LOSS, "kl": "k1", "kl_importance": True}),
        "k3 in the loss, times the ratio": Arm({**LOSS, "kl": "k3", "kl_importance": True}),
        "exact in the loss": Arm({**LOSS, "kl": "full"}),
    },
    (
        Claim(
            "k1 in the loss does not hold the policy, k2 does",
            PAPER,
            "k1 in the loss",
            "k2 in the loss",
            "kl",
        ),
        Claim(
            "k3 in the loss holds it less than k2", PAPER, "k3 in the loss", "k2 in the loss", "kl"
        ),
        Claim(
            "k1 in the reward holds it: less KL than without",
            PAPER,
            "none",
            "k1 in the reward",
            "kl",
        ),
        Claim(
            "k1 in the loss holds it when it carries the ratio",
            PAPER,
            "k1 in the loss",
            "k1 in the loss, times the ratio",
            "kl",
        ),
    ),
    ("end", "kl"),
)


def main(options: AblationConfig) -> None:
    arms = ("none", "k1 in the reward", "k2 in the loss")
    run(QUESTION, options, smollm2={"arms": arms})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
