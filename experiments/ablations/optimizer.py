"""Adam's eps, and other optimizers.

Question   Does it matter that PPO implementations set Adam's eps to 1e-5 instead of 1e-8 (the paper
           lists it and claims nothing), and how do other optimizers compare? SGD has its own
           learning rate; the others share one.
Paper      Huang et al. 2022,
           https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/
Command    python experiments/ablations/optimizer.py
Found      2 minutes at --scale ladder on a core that other work shared.
           eps 1e-5 beats 1e-8: not decided (reward of all steps -.006, 95 % interval -.025 to
           +.012).
           Adam beats RMSProp: agrees (reward of all steps +.049, 95 % interval +.022 to +.076).
           6 minutes at --scale small on a core that other work shared.
           eps 1e-5 beats 1e-8: not decided (reward of all steps -.003, 95 % interval -.006 to
           +.001).
           Adam beats RMSProp: not decided (reward of all steps -.004, 95 % interval -.009 to
           +.000).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

QUESTION = Question(
    "optimizer",
    {
        "Adam, eps 1e-5": Arm({"adam_eps": 1e-5}),
        "Adam, eps 1e-8": Arm({"adam_eps": 1e-8}),
        "Adam, eps 1e-3": Arm({"adam_eps": 1e-3}),
        "AdamW": Arm({"optimizer": "adamw"}),
        "RMSProp": Arm({"optimizer": "rmsprop"}),
        "SGD, rate 1": Arm({"optimizer": "sgd", "lr": 1.0}),
    },
    (
        Claim("eps 1e-5 beats 1e-8", "", "Adam, eps 1e-5", "Adam, eps 1e-8", "area"),
        Claim("Adam beats RMSProp", "", "Adam, eps 1e-5", "RMSProp", "area"),
    ),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
