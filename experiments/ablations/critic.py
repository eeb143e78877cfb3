"""How the critic starts.

Question   Do the value head's initial weights matter, and does it help to train the critic alone
           first?
Paper      VC-PPO, https://arxiv.org/abs/2503.01491, on a separate critic. A head that starts at 0
           is a detail of https://github.com/openai/lm-human-preferences;
           https://arxiv.org/abs/2403.17031 starts from the reward model.
Changed    VC-PPO's claim is about a separate critic. That the first claim was tested on a shared
           one was noticed after the runs, which are the same.
Command    python experiments/ablations/critic.py
Found      7 minutes at --scale ladder on a core that other work shared.
           a critic that learns alone first pays for the steps it takes: not decided (reward at the
           end +.001, 95 % interval -.038 to +.040).
           and one that shares the policy's network does, too: not decided (reward at the end -.013,
           95 % interval -.062 to +.036).
           a value head that starts at 0 beats a random one: agrees (reward of all steps +.060, 95 %
           interval +.031 to +.088).
           13 minutes at --scale small on a core that other work shared.
           a critic that learns alone first pays for the steps it takes: disagrees (reward at the
           end -.015, 95 % interval -.029 to -.000).
           and one that shares the policy's network does, too: not decided (reward at the end -.004,
           95 % interval -.015 to +.006).
           a value head that starts at 0 beats a random one: agrees (reward of all steps +.045, 95 %
           interval +.030 to +.060).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

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
        Claim(
            "a critic that learns alone first pays for the steps it takes",
            PAPER,
            "separate, warm-up",
            "separate",
            "end",
        ),
        Claim(
            "and one that shares the policy's network does, too",
            "",
            "warm-up of 10 steps",
            "zero",
            "end",
        ),
        Claim("a value head that starts at 0 beats a random one", "", "zero", "normal", "area"),
    ),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
