"""Clip-higher: a wider clip bound for tokens that become more likely.

Question   Does a higher upper bound of the ratio keep the entropy up (DAPO's claim), and does it
           cost reward?
Paper      https://arxiv.org/abs/2503.14476
Changed    Entropy at the end, where all arms have almost none, was asked first; the entropy of all
           steps was added after that result.
Command    python experiments/ablations/clip_higher.py
Found      3 minutes at --scale ladder on a core that other work shared.
           clip-higher keeps more entropy: not decided (entropy of all steps -.020, 95 % interval
           -.041 to +.000).
           clip-higher ends with more entropy: not decided (entropy at the end -.001, 95 % interval
           -.026 to +.024).
           clip-higher learns more: not decided (reward of all steps -.001, 95 % interval -.022 to
           +.020).
           10 minutes at --scale small on a core that other work shared.
           clip-higher keeps more entropy: not decided (entropy of all steps +.001, 95 % interval
           -.004 to +.006).
           clip-higher ends with more entropy: disagrees (entropy at the end -.006, 95 % interval
           -.012 to -.001).
           clip-higher learns more: not decided (reward of all steps +.003, 95 % interval -.006 to
           +.013).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

PAPER = "https://arxiv.org/abs/2503.14476"
QUESTION = Question(
    "clip_higher",
    {
        f"{high}": Arm({"clip_low": 0.2, "clip_high": high, "epochs": 4})
        for high in (0.2, 0.28, 0.4, 0.8)
    },
    (
        Claim("clip-higher keeps more entropy", PAPER, "0.28", "0.2", "mean_entropy"),
        Claim("clip-higher ends with more entropy", PAPER, "0.28", "0.2", "entropy"),
        Claim("clip-higher learns more", PAPER, "0.28", "0.2", "area"),
    ),
    ("end", "area", "mean_entropy"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
