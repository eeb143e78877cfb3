"""The controller of the KL coefficient, and reward hacking against a judge that is not trained against.

Question   The reward is a proxy of what is wanted. Which controller keeps the policy where the proxy still tells the
           truth?
Paper      Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; over-optimisation: https://arxiv.org/abs/2210.10760.
Command    python experiments/ablations/controller.py
Found      3 minutes at --scale ladder on a core that other work shared.
           without a penalty the proxy is hacked: agrees (gold +.955, 95 % interval +.936 to +.971).
           a target in nats keeps what is wanted: agrees (gold +.847, 95 % interval +.812 to +.882).
"""

from scales import AblationConfig, Arm, Claim, Question, run

from jaxppo import cli

QUESTION = Question(
    "controller",
    {
        "none": Arm({"kl_coef": 0.0}),
        "fixed .1": Arm({"kl_coef": 0.1}),
        "fixed .3": Arm({"kl_coef": 0.3}),
        "adaptive, 3 nats": Arm({"kl_coef": 0.1, "kl_adaptive": True, "kl_target": 3.0, "kl_horizon": 640.0}),
        "adaptive, 1 nat": Arm({"kl_coef": 0.1, "kl_adaptive": True, "kl_target": 1.0, "kl_horizon": 640.0}),
    },
    (
        Claim("without a penalty the proxy is hacked", "https://arxiv.org/abs/2210.10760", "fixed .3", "none", "gold"),
        Claim("a target in nats keeps what is wanted", "https://arxiv.org/abs/1909.08593", "adaptive, 1 nat", "none", "gold"),
        Claim("a target in nats keeps what is wanted", "https://arxiv.org/abs/1909.08593", "adaptive, 3 nats", "none", "gold"),
    ),
    ("end", "gold", "kl"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options, ladder={"tasks": ("hack",)}, smollm2={"arms": ("none", "fixed .1", "adaptive, 3 nats"), "lr": 1e-3})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
