"""The controller of the KL coefficient, and reward hacking, measured by a judge that is not
trained against.

Question   The reward is a proxy, accurate near the reference and wrong far from it. Which
           controller keeps the policy where the proxy is accurate, and is anything gained there?
Paper      Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; over-optimisation:
           https://arxiv.org/abs/2210.10760.
Changed    In a first toy task nothing could be gained, so the policy that moved least was the best.
           Its record is withdrawn.
Minutes    Of SmolLM2's 164 minutes one run stood still for 75 (its process was stopped); the others
           took 8 to 12 each.
Command    python experiments/ablations/controller.py
Found      1 minutes at --scale ladder on a core that other work shared.
           without a penalty the proxy is hacked: worse than under a target: agrees (gold +.586, 95
           % interval +.545 to +.626).
           under a target of 3 nats something is gained: agrees (gold +.400, 95 % interval +.357 to
           +.444).
           a target of 3 nats beats a fixed coefficient of .1: not decided (gold -.013, 95 %
           interval -.045 to +.018).
           a fixed coefficient of .1 keeps what is wanted: agrees (gold +.599, 95 % interval +.583
           to +.615).
           8 minutes at --scale small on a core that other work shared.
           without a penalty the proxy is hacked: worse than under a target: not decided (gold
           +.002, 95 % interval -.006 to +.011).
           under a target of 3 nats something is gained: agrees (gold +.047, 95 % interval +.026 to
           +.068).
           a target of 3 nats beats a fixed coefficient of .1: not decided (gold -.003, 95 %
           interval -.009 to +.003).
           a fixed coefficient of .1 keeps what is wanted: not decided (gold +.005, 95 % interval
           -.008 to +.019).
           164 minutes at --scale smollm2 on a core that other work shared.
           without a penalty the proxy is hacked: worse than under a target: disagrees (gold -.378,
           95 % interval -.565 to -.191).
           a target of 3 nats beats a fixed coefficient of .1: not decided (gold +.129, 95 %
           interval -.064 to +.322).
           a fixed coefficient of .1 keeps what is wanted: disagrees (gold -.507, 95 % interval
           -.883 to -.131).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

TARGET = "https://arxiv.org/abs/1909.08593"
# a horizon of rows in which the coefficient moves by a fifth at most: short, since the runs are
ADAPTIVE = {"kl_coef": 0.1, "kl_adaptive": True, "kl_horizon": 160.0}
QUESTION = Question(
    "controller",
    {
        "none": Arm({"kl_coef": 0.0}),
        "untrained": Arm({"lr": 0.0}),
        "fixed .1": Arm({"kl_coef": 0.1}),
        "fixed .3": Arm({"kl_coef": 0.3}),
        "adaptive, 3 nats": Arm({**ADAPTIVE, "kl_target": 3.0}),
        "adaptive, 1 nat": Arm({**ADAPTIVE, "kl_target": 1.0}),
    },
    (
        Claim(
            "without a penalty the proxy is hacked: worse than under a target",
            TARGET,
            "adaptive, 3 nats",
            "none",
            "gold",
        ),
        Claim(
            "under a target of 3 nats something is gained",
            TARGET,
            "adaptive, 3 nats",
            "untrained",
            "gold",
        ),
        Claim(
            "a target of 3 nats beats a fixed coefficient of .1",
            "",
            "adaptive, 3 nats",
            "fixed .1",
            "gold",
        ),
        Claim("a fixed coefficient of .1 keeps what is wanted", TARGET, "fixed .1", "none", "gold"),
    ),
    ("end", "gold", "kl"),
)


def main(options: AblationConfig) -> None:
    three = ("none", "fixed .1", "adaptive, 3 nats")
    run(
        QUESTION,
        options,
        ladder={"tasks": ("hack",)},
        small={"proxy": True},
        smollm2={"arms": three, "lr": 1e-3},
    )


if __name__ == "__main__":
    cli.script(main, AblationConfig)
