"""How token losses are aggregated, and what that does to the length of wrong answers.

Question   Does dividing each response's loss by its length make wrong answers longer than right
           ones, more than dividing by a constant does? This is Dr. GRPO's claim: each token of a
           long wrong answer is punished less. The metric is how much longer the wrong answers are,
           because all responses may grow.
Paper      https://arxiv.org/abs/2503.20783
Changed    The first question was about the length of wrong answers alone: they grew, and so did the
           right ones. That record is withdrawn.
Command    python experiments/ablations/aggregation.py
Found      4 minutes at --scale ladder on a core that other work shared.
           dividing by each response's length makes wrong answers the longer ones: not decided
           (tokens of wrong answers above right ones' +1.011, 95 % interval +.003 to +2.019).
           5 minutes at --scale small on a core that other work shared.
           dividing by each response's length makes wrong answers the longer ones: agrees (tokens of
           wrong answers above right ones' +.118, 95 % interval +.046 to +.190).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

GROUPS = {"advantage": "group_mean", "value_loss": "none", "group_size": 8}
QUESTION = Question(
    "aggregation",
    {
        name: Arm({**GROUPS, "aggregate": name})
        for name in ("constant", "sequence_mean", "token_mean", "sequence_sum")
    },
    (
        Claim(
            "dividing by each response's length makes wrong answers the longer ones",
            "https://arxiv.org/abs/2503.20783",
            "sequence_mean",
            "constant",
            "excess_length",
        ),
    ),
    ("end", "length", "right_length", "wrong_length"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options, ladder={"tasks": ("answer",), "response_length": 24})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
