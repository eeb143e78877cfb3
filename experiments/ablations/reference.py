"""A reference that moves.

Question   The KL to a fixed reference bounds what can be learned. Is more learned if the reference
           becomes the policy every ten steps, or follows it as an average over about ten? The
           penalty's coefficient is the same.
Paper      Trust-region preference optimisation, https://arxiv.org/abs/2404.09656; resets in ProRL,
           https://arxiv.org/abs/2505.24864.
Note       At --scale ladder the arm without a penalty ends as high as a reference that moves:
           nothing there needs one.
Command    python experiments/ablations/reference.py
Found      4 minutes at --scale ladder on a core that other work shared.
           a reference that becomes the policy every ten steps beats a fixed one: agrees (reward of
           the trained policy +.443, 95 % interval +.427 to +.460).
           one that follows the policy does, too: agrees (reward of the trained policy +.446, 95 %
           interval +.431 to +.461).
           24 minutes at --scale small on a core that other work shared.
           a reference that becomes the policy every ten steps beats a fixed one: not decided
           (reward of the trained policy +.008, 95 % interval -.009 to +.026).
           one that follows the policy does, too: not decided (reward of the trained policy +.007,
           95 % interval -.001 to +.015).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

PAPER = "https://arxiv.org/abs/2404.09656"
QUESTION = Question(
    "reference",
    {
        "fixed": Arm(),
        "reset every ten steps": Arm({"reference_every": 10}),
        "average": Arm({"reference_decay": 0.9}),
        "no penalty": Arm({"kl_coef": 0.0}),
    },
    (
        Claim(
            "a reference that becomes the policy every ten steps beats a fixed one",
            PAPER,
            "reset every ten steps",
            "fixed",
            "score",
        ),
        Claim("one that follows the policy does, too", PAPER, "average", "fixed", "score"),
    ),
    ("end", "area", "score"),
)


def main(options: AblationConfig) -> None:
    # At --scale small policies move a tenth of a nat: a lower coefficient would hold none of them.
    run(QUESTION, options, ladder={"kl_coef": 0.1}, small={"kl_coef": 1.0})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
