"""Low-rank adapters against full training.

Question   How much rank does policy optimisation need, and how far from the reference does each
           rank go? At --scale ladder the network under the adapters is random, so the question is
           one of capacity; --scale small starts from a trained network. All arms share a learning
           rate, except one with ten times as much, which is said to suit adapters
           (https://thinkingmachines.ai/blog/lora/).
Paper      LoRA, https://arxiv.org/abs/2106.09685; LoRA learns less and forgets less,
           https://arxiv.org/abs/2405.09673.
Command    python experiments/ablations/adapters.py
Found      12 minutes at --scale ladder on a core that other work shared.
           full training learns more than rank 4: agrees (reward of all steps +.534, 95 % interval
           +.506 to +.562).
           and more than rank 4 at ten times its rate: agrees (reward of all steps +.527, 95 %
           interval +.500 to +.555).
           rank 16 learns more than rank 1: agrees (reward of all steps +.019, 95 % interval +.016
           to +.023).
           rank 4 stays nearer to the reference than full training: agrees (fewer nats to the
           reference +8.663, 95 % interval +8.429 to +8.898).
           rank 3 on all layers learns more than rank 16 on q and v: agrees (reward of all steps
           +.015, 95 % interval +.012 to +.018).
           31 minutes at --scale small on a core that other work shared.
           full training learns more than rank 4: agrees (reward of all steps +.021, 95 % interval
           +.017 to +.025).
           and more than rank 4 at ten times its rate: agrees (reward of all steps +.014, 95 %
           interval +.010 to +.018).
           rank 16 learns more than rank 1: agrees (reward of all steps +.005, 95 % interval +.002
           to +.008).
           rank 4 stays nearer to the reference than full training: agrees (fewer nats to the
           reference +.098, 95 % interval +.078 to +.118).
           rank 3 on all layers learns more than rank 16 on q and v: not decided (reward of all
           steps -.001, 95 % interval -.003 to +.000).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

PAPER = "https://arxiv.org/abs/2405.09673"


def rank_of(rank: int) -> dict[str, float]:
    return {"lora": rank, "lora_alpha": 2.0 * rank}


QUESTION = Question(
    "adapters",
    {
        "full": Arm({"lora": 0}),
        **{f"rank {rank}": Arm(rank_of(rank)) for rank in (1, 4, 16)},
        "rank 4, ten times the rate": Arm(rank_of(4), times={"lr": 10}),
        "rank 3 on all layers": Arm({**rank_of(3), "lora_on": "all"}),
    },
    (
        Claim("full training learns more than rank 4", PAPER, "full", "rank 4", "area"),
        Claim(
            "and more than rank 4 at ten times its rate",
            "",
            "full",
            "rank 4, ten times the rate",
            "area",
        ),
        Claim("rank 16 learns more than rank 1", PAPER, "rank 16", "rank 1", "area"),
        Claim(
            "rank 4 stays nearer to the reference than full training",
            PAPER,
            "rank 4",
            "full",
            "-kl",
        ),
        Claim(
            "rank 3 on all layers learns more than rank 16 on q and v",
            "https://thinkingmachines.ai/blog/lora/",
            "rank 3 on all layers",
            "rank 16",
            "area",
        ),
    ),
    ("end", "area", "kl"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
