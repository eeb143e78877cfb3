"""A discount for each token, or the response as one action.

Question   Does a discount below 1 for each token learn better than treating the response as one
           action of a bandit (gamma 1)?
Paper      RL4LMs, https://arxiv.org/abs/2210.01241
Command    python experiments/ablations/gamma.py
Found      2 minutes at --scale ladder on a core that other work shared.
           gamma .95 learns better than 1: not decided (reward of all steps -.012, 95 % interval
           -.029 to +.005).
           4 minutes at --scale small on a core that other work shared.
           gamma .95 learns better than 1: not decided (reward of all steps +.001, 95 % interval
           -.004 to +.005).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

PAPER = "https://arxiv.org/abs/2210.01241"
QUESTION = Question(
    "gamma",
    {f"{gamma}": Arm({"gamma": gamma}) for gamma in (1.0, 0.99, 0.95, 0.8)},
    (Claim("gamma .95 learns better than 1", PAPER, "0.95", "1.0", "area"),),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
