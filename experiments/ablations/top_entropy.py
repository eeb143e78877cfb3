"""Learning from the tokens of highest entropy alone.

Question   Few tokens of a response decide where it goes. Is as much learned from these alone?
           `top_entropy` keeps the gradient of a share of each batch's tokens; denominators stay.
Paper      Beyond the 80/20 rule, https://arxiv.org/abs/2506.01939: at 8 billion parameters a fifth
           of the tokens teaches as much as all, at 14 and 32 more.
Command    python experiments/ablations/top_entropy.py
Found      4 minutes at --scale ladder on a core that other work shared.
           the fifth of the tokens with the highest entropy teaches more than all: disagrees (reward
           of all steps -.270, 95 % interval -.298 to -.243).
           the half teaches more than all: disagrees (reward of all steps -.146, 95 % interval -.171
           to -.121).
           the fifth keeps more entropy than all: agrees (entropy of all steps +.571, 95 % interval
           +.518 to +.625).
           2 minutes at --scale small on a core that other work shared.
           the fifth of the tokens with the highest entropy teaches more than all: disagrees (reward
           of all steps -.022, 95 % interval -.028 to -.016).
           the half teaches more than all: disagrees (reward of all steps -.007, 95 % interval -.011
           to -.003).
           the fifth keeps more entropy than all: agrees (entropy of all steps +.037, 95 % interval
           +.030 to +.044).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

PAPER = "https://arxiv.org/abs/2506.01939"
FREE = {"value_loss": "none", "group_size": 8, "advantage": "group"}
QUESTION = Question(
    "top_entropy",
    {
        "all": Arm(FREE),
        "a half": Arm({**FREE, "top_entropy": 0.5}),
        "a fifth": Arm({**FREE, "top_entropy": 0.2}),
    },
    (
        Claim(
            "the fifth of the tokens with the highest entropy teaches more than all",
            PAPER,
            "a fifth",
            "all",
            "area",
        ),
        Claim("the half teaches more than all", "", "a half", "all", "area"),
        Claim("the fifth keeps more entropy than all", PAPER, "a fifth", "all", "mean_entropy"),
    ),
    ("end", "area", "mean_entropy"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
