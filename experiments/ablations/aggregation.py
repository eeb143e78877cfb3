"""How token losses become one number, and what that does to the length of wrong answers.

Question   Does dividing each response's loss by its length make wrong answers longer than dividing by a constant
           does? (Dr. GRPO's claim: a long wrong answer is punished less for each token.)
Paper      https://arxiv.org/abs/2503.20783
Command    python experiments/ablations/aggregation.py
Found      6 minutes at --scale ladder on a core that other work shared.
           dividing by each response's length lets wrong answers grow: agrees (tokens of wrong answers +1.532, 95 % interval
           +.710 to +2.295).
"""

from scales import AblationConfig, Arm, Claim, Question, run

from jaxppo import cli

GROUPS = {"advantage": "group_mean", "value_loss": "none", "group_size": 8}
QUESTION = Question(
    "aggregation",
    {name: Arm({**GROUPS, "aggregate": name}) for name in ("constant", "sequence_mean", "token_mean", "sequence_sum")},
    (
        Claim(
            "dividing by each response's length lets wrong answers grow", "https://arxiv.org/abs/2503.20783", "sequence_mean",
            "constant", "wrong_length",
        ),
    ),
    ("end", "length", "wrong_length"),
)  # fmt: skip


def main(options: AblationConfig) -> None:
    run(QUESTION, options, ladder={"tasks": ("answer",), "response_length": 12})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
