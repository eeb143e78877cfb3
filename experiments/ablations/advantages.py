"""Advantage estimators: GAE's lambda, groups, leave-one-out, the batch's mean.

Question   Is a critic needed, and which baseline works without one?
Paper      RLOO: https://arxiv.org/abs/2402.14740. GRPO: https://arxiv.org/abs/2402.03300. VC-PPO,
           on two lambdas: https://arxiv.org/abs/2503.01491.
Changed    In the first record the critic's advantages were whitened and the others were not, and
           the group's were divided by its deviation: two claims, which agreed, mixed a baseline
           with a scale. That record is withdrawn.
Command    python experiments/ablations/advantages.py
Found      5 minutes at --scale ladder on a core that other work shared.
           leave-one-out beats PPO with a critic: agrees (reward of all steps +.027, 95 % interval
           +.014 to +.039).
           a group's mean as baseline beats none: agrees (reward of all steps +.071, 95 % interval
           +.044 to +.097).
           a critic that learns with lambda 1 helps a policy that has .95: not decided (reward of
           all steps -.010, 95 % interval -.021 to +.001).
           11 minutes at --scale small on a core that other work shared.
           leave-one-out beats PPO with a critic: disagrees (reward of all steps -.023, 95 %
           interval -.027 to -.019).
           a group's mean as baseline beats none: disagrees (reward of all steps -.027, 95 %
           interval -.033 to -.021).
           a critic that learns with lambda 1 helps a policy that has .95: not decided (reward of
           all steps -.000, 95 % interval -.001 to +.000).
           60 minutes at --scale smollm2 on a core that other work shared.
           leave-one-out beats PPO with a critic: agrees (reward of all steps +.079, 95 % interval
           +.032 to +.127).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

# The same prompts for all, whether an estimator has a use for copies or not; and a baseline alone,
# no change of scale.
ALIKE = {"group_size": 8, "whiten_advantages": False}
FREE = {**ALIKE, "value_loss": "none"}
QUESTION = Question(
    "advantages",
    {
        "GAE .95": Arm({**ALIKE, "lam": 0.95}),
        "GAE 1": Arm({**ALIKE, "lam": 1.0}),
        "GAE .5": Arm({**ALIKE, "lam": 0.5}),
        "GAE .95, critic 1": Arm({**ALIKE, "lam": 0.95, "critic_lam": 1.0}),
        "group's mean": Arm({**FREE, "advantage": "group_mean"}),
        "group's mean and deviation": Arm({**FREE, "advantage": "group"}),
        "leave-one-out": Arm({**FREE, "advantage": "rloo"}),
        "batch mean": Arm({**FREE, "advantage": "batch_mean"}),
        "moving average": Arm({**FREE, "advantage": "moving_average"}),
        "REINFORCE++": Arm({**FREE, "advantage": "reinforce_plus_plus"}),
        "no baseline": Arm({**FREE, "advantage": "returns"}),
    },
    (
        Claim(
            "leave-one-out beats PPO with a critic",
            "https://arxiv.org/abs/2402.14740",
            "leave-one-out",
            "GAE .95",
            "area",
        ),
        Claim("a group's mean as baseline beats none", "", "group's mean", "no baseline", "area"),
        Claim(
            "a critic that learns with lambda 1 helps a policy that has .95",
            "https://arxiv.org/abs/2503.01491",
            "GAE .95, critic 1",
            "GAE .95",
            "area",
        ),
    ),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options, smollm2={"arms": ("GAE .95", "leave-one-out", "no baseline")})


if __name__ == "__main__":
    cli.script(main, AblationConfig)
