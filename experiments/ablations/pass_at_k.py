"""An advantage for the best of eight responses.

Question   Does the advantage of pass@k, which only the best response of a group has, pay for the
           best of eight, and what does it cost one response? The judge draws eight responses to
           each of 256 prompts. With rewards of 0 or 1 the best of eight is pass@8.
Paper      https://arxiv.org/abs/2503.19595
Note       With k = 8 of 8 responses and rewards of 0 or 1, a group teaches only if one response
           alone is right: 6 % at --scale small, if its words were equally hard.
Command    python experiments/ablations/pass_at_k.py
Found      5 minutes at --scale ladder on a core that other work shared.
           the advantage of pass@8 raises the best of eight above GRPO's: disagrees (best of eight
           responses -.087, 95 % interval -.133 to -.041).
           and GRPO's raises one response more: agrees (reward of the trained policy +.317, 95 %
           interval +.262 to +.372).
           9 minutes at --scale small on a core that other work shared.
           the advantage of pass@8 raises the best of eight above GRPO's: disagrees (best of eight
           responses -.018, 95 % interval -.029 to -.008).
           and GRPO's raises one response more: agrees (reward of the trained policy +.054, 95 %
           interval +.041 to +.067).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

PAPER = "https://arxiv.org/abs/2503.19595"
FREE = {"value_loss": "none", "group_size": 8}
QUESTION = Question(
    "pass_at_k",
    {  # both are divided by the group's deviation
        "GRPO": Arm({**FREE, "advantage": "group"}),
        "pass@8": Arm({**FREE, "advantage": "pass_at_k"}),
        "leave-one-out": Arm({**FREE, "advantage": "rloo"}),
    },
    (
        Claim(
            "the advantage of pass@8 raises the best of eight above GRPO's",
            PAPER,
            "pass@8",
            "GRPO",
            "best_of_8",
        ),
        Claim("and GRPO's raises one response more", PAPER, "GRPO", "pass@8", "score"),
    ),
    ("end", "score", "best_of_8"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options, ladder={"rollouts": 2048}, small={"rollouts": 2048})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
