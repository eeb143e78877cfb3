"""Advantages of episodes of several turns: of tokens or of turns, with a critic or a group.

Question   Should a turn be one action of GAE, and is a critic needed, at equal numbers of episodes?
Tasks      Three games (`jaxppo/ablation/games.py`): a bandit that shows its arm once, rewarded at
           every turn; a number to guess and a maze, rewarded at the end. At --scale ladder alone.
Paper      Turn-PPO, which says that turn-level advantages learn more than token-level ones, and
           that PPO is more robust than GRPO in episodes of several turns:
           https://arxiv.org/abs/2512.17008. RLOO, which found leave-one-out better than PPO in one
           turn: https://arxiv.org/abs/2402.14740. A group plays one instance (the same number to
           guess), so its mean knows what the critic has to infer.
Command    python experiments/ablations/turns.py
Found      17 minutes at --scale ladder on a core that other work shared.
           turn-level advantages learn more than token-level ones: not decided (reward of all steps
           +.022, 95 % interval -.012 to +.056).
           a critic of tokens learns more than leave-one-out: not decided (reward of all steps
           +.022, 95 % interval -.017 to +.060).
           a critic of turns learns more than leave-one-out: not decided (reward of all steps +.044,
           95 % interval -.000 to +.088).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question
from jaxppo.errors import UserError

PAPER = "https://arxiv.org/abs/2512.17008"
# The same episodes for all, and a baseline alone, no change of scale.
ALIKE = {"group_size": 8, "whiten_advantages": False}
FREE = {**ALIKE, "value_loss": "none"}
QUESTION = Question(
    "turns",
    {
        "tokens": Arm({**ALIKE, "advantage": "gae"}),
        "turns": Arm({**ALIKE, "advantage": "turn_gae"}),
        "leave-one-out": Arm({**FREE, "advantage": "rloo"}),
        "group's mean and deviation": Arm({**FREE, "advantage": "group"}),
    },
    (
        Claim(
            "turn-level advantages learn more than token-level ones",
            PAPER,
            "turns",
            "tokens",
            "area",
        ),
        Claim(
            "a critic of tokens learns more than leave-one-out",
            PAPER,
            "tokens",
            "leave-one-out",
            "area",
        ),
        Claim(
            "a critic of turns learns more than leave-one-out",
            PAPER,
            "turns",
            "leave-one-out",
            "area",
        ),
    ),
)


def main(options: AblationConfig) -> None:
    if options.scale != "ladder":
        raise UserError(f"--scale {options.scale} has no games; leave it at ladder")
    run(QUESTION, options, ladder={"turns": True})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
