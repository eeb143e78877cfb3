"""Policy losses against each other, at equal samples.

Question   Which policy loss learns most from the same rollouts, in four epochs each, when nothing else differs?
Paper      PPO: https://arxiv.org/abs/1707.06347. GSPO: https://arxiv.org/abs/2507.18071. CISPO:
           https://arxiv.org/abs/2506.13585.
Command    python experiments/ablations/losses.py
"""

from scales import AblationConfig, Arm, Claim, Question, run

from jaxppo import cli

NAMES = ("clip", "reinforce", "dual_clip", "gspo", "gspo_token", "cispo", "sapo", "gmpo", "kl_penalty", "dppo_tv")
PPO, GSPO, CISPO = (f"https://arxiv.org/abs/{number}" for number in ("1707.06347", "2507.18071", "2506.13585"))
QUESTION = Question(
    "losses",
    {name: Arm({"loss": name, "epochs": 4}) for name in NAMES},
    (
        Claim("clipping beats the plain gradient over four epochs", PPO, "clip", "reinforce", "area"),
        Claim("GSPO learns faster than token-wise clipping", GSPO, "gspo", "clip", "area"),
        Claim("CISPO learns faster than clipping", CISPO, "cispo", "clip", "area"),
    ),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
