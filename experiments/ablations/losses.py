"""Policy losses against each other, on the same number of samples.

Question   Which policy loss learns most from the same rollouts, in four epochs each, if nothing
           else differs? All arms but the last have GRPO's advantages and no critic, as in the
           papers: a sequence-level loss would ignore what a critic says about tokens. Token-level
           losses are means over tokens, sequence-level losses are means over sequences. GSPO's own
           bounds are for responses of a thousand tokens, so one arm has wider ones. Not tested:
           clip_cov, kl_cov and dppo_kl, and the off-policy losses awr and dro.
Paper      PPO: https://arxiv.org/abs/1707.06347. GSPO: https://arxiv.org/abs/2507.18071. CISPO:
           https://arxiv.org/abs/2506.13585.
Changed    The arm with wider bounds was added after the results of the others.
Command    python experiments/ablations/losses.py
Found      11 minutes at --scale ladder on a core that other work shared.
           clipping beats the plain gradient over four epochs: agrees (reward of all steps +.242, 95
           % interval +.187 to +.296).
           GSPO learns faster than token-wise clipping (GRPO): disagrees (reward of all steps -.056,
           95 % interval -.064 to -.048).
           GSPO with bounds of .08 learns faster than that: not decided (reward of all steps -.007,
           95 % interval -.031 to +.016).
           CISPO learns faster than clipping: disagrees (reward of all steps -.088, 95 % interval
           -.130 to -.046).
           21 minutes at --scale small on a core that other work shared.
           clipping beats the plain gradient over four epochs: agrees (reward of all steps +.101, 95
           % interval +.082 to +.120).
           GSPO learns faster than token-wise clipping (GRPO): not decided (reward of all steps
           -.002, 95 % interval -.015 to +.010).
           GSPO with bounds of .08 learns faster than that: agrees (reward of all steps +.028, 95 %
           interval +.015 to +.041).
           CISPO learns faster than clipping: disagrees (reward of all steps -.038, 95 % interval
           -.058 to -.019).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

GROUPS = {"value_loss": "none", "group_size": 8, "advantage": "group", "epochs": 4}
TOKENS = ("clip", "reinforce", "dual_clip", "cispo", "kl_penalty", "dppo_tv")
SEQUENCES = ("gspo", "gspo_token", "sapo", "gmpo")
PPO, GSPO, CISPO = (
    f"https://arxiv.org/abs/{number}" for number in ("1707.06347", "2507.18071", "2506.13585")
)
QUESTION = Question(
    "losses",
    {
        **{name: Arm({**GROUPS, "loss": name, "aggregate": "token_mean"}) for name in TOKENS},
        **{name: Arm({**GROUPS, "loss": name, "aggregate": "sequence_mean"}) for name in SEQUENCES},
        # .2 over the root of six tokens, as if their log-ratios were independent
        "gspo, bounds .08": Arm(
            {
                **GROUPS,
                "loss": "gspo",
                "aggregate": "sequence_mean",
                "clip_low": 0.08,
                "clip_high": 0.08,
            }
        ),
        "clip, mean over sequences": Arm({**GROUPS, "loss": "clip", "aggregate": "sequence_mean"}),
        "clip, with a critic": Arm({"group_size": 8, "epochs": 4}),
    },
    (
        Claim(
            "clipping beats the plain gradient over four epochs", PPO, "clip", "reinforce", "area"
        ),
        Claim(
            "GSPO learns faster than token-wise clipping (GRPO)",
            GSPO,
            "gspo",
            "clip, mean over sequences",
            "area",
        ),
        Claim(
            "GSPO with bounds of .08 learns faster than that",
            "",
            "gspo, bounds .08",
            "clip, mean over sequences",
            "area",
        ),
        Claim("CISPO learns faster than clipping", CISPO, "cispo", "clip", "area"),
    ),
    ("end", "area", "score"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
