"""The KL to the reference: where it stands and how it is estimated.

Question   Which estimator of the KL, in the reward or in the loss, holds the policy near the reference, at the same
           coefficient?
Paper      Schulman 2020, http://joschu.net/blog/kl-approx.html; on the gradients: https://arxiv.org/abs/2510.01555.
Command    python experiments/ablations/kl.py
Found      3 minutes at --scale ladder on a core that other work shared.
           k1 in the loss does not hold the policy, k2 does: agrees (nats to the reference +1.092, 95 % interval +.894 to
           +1.275).
           k3 in the loss holds it less than k2: disagrees (nats to the reference -.812, 95 % interval -.934 to -.668).
           k1 in the reward holds it: less KL than without: agrees (nats to the reference +7.307, 95 % interval +7.156 to
           +7.465).
"""

from scales import AblationConfig, Arm, Claim, Question, run

from jaxppo import cli

PAPER = "https://arxiv.org/abs/2510.01555"
REWARD, LOSS = {"kl_place": "reward", "kl_coef": 0.1}, {"kl_place": "loss", "kl_coef": 0.1}
QUESTION = Question(
    "kl",
    {
        "none": Arm({"kl_place": "loss", "kl": "k2", "kl_coef": 0.0}),
        "k1 in the reward": Arm({**REWARD, "kl": "k1"}),
        "k3 in the reward": Arm({**REWARD, "kl": "k3"}),
        "k1 in the loss": Arm({**LOSS, "kl": "k1"}),
        "k2 in the loss": Arm({**LOSS, "kl": "k2"}),
        "k3 in the loss": Arm({**LOSS, "kl": "k3"}),
        "exact in the loss": Arm({**LOSS, "kl": "full"}),
    },
    (
        Claim("k1 in the loss does not hold the policy, k2 does", PAPER, "k1 in the loss", "k2 in the loss", "kl"),
        Claim("k3 in the loss holds it less than k2", PAPER, "k3 in the loss", "k2 in the loss", "kl"),
        Claim("k1 in the reward holds it: less KL than without", PAPER, "none", "k1 in the reward", "kl"),
    ),
    ("end", "kl"),
)


def main(options: AblationConfig) -> None:
    arms = ("none", "k1 in the reward", "k2 in the loss")
    run(QUESTION, options, smollm2={"arms": arms})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
