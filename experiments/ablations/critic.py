"""How the critic starts.

Question   Do the value head's initial weights matter, and does it help to train the critic alone first?
Paper      VC-PPO, https://arxiv.org/abs/2503.01491; implementation details of PPO, https://arxiv.org/abs/2403.17031.
Command    python experiments/ablations/critic.py
Found      7 minutes at --scale ladder on a core that other work shared.
           a critic that learns alone first pays for the steps it takes: not decided (reward at the end -.013, 95 % interval
           -.046 to +.021).
           a value head that starts at 0 beats a random one: agrees (reward of all steps +.060, 95 % interval +.043 to +.078).
"""

from scales import AblationConfig, Arm, Claim, Question, run

from jaxppo import cli

PAPER = "https://arxiv.org/abs/2503.01491"
QUESTION = Question(
    "critic",
    {
        "zero": Arm({"value_init": "zero"}),
        "normal": Arm({"value_init": "normal"}),
        "warm-up of 10 steps": Arm({"value_init": "zero", "critic_warmup": 10}),
        "separate": Arm({"critic": "separate"}),
        "separate, warm-up": Arm({"critic": "separate", "critic_warmup": 10}),
    },
    (
        Claim("a critic that learns alone first pays for the steps it takes", PAPER, "warm-up of 10 steps", "zero", "end"),
        Claim("a value head that starts at 0 beats a random one", "https://arxiv.org/abs/2403.17031", "zero", "normal", "area"),
    ),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
