"""Sampling with weights in 8 bits, and masks and weights that repair it.

Question   The responses are sampled with the policy's weights in 8 bits, and scored in float32.
           What does it cost the policy, and what is won by a truncated importance weight, by
           leaving out tokens or responses that the two see differently? `first_ratio_off` is the
           largest |scorer / sampler - 1|. The judge samples in float32.
Paper      Weights: https://fengyao.notion.site/off-policy-rl; leaving out what is off:
           https://arxiv.org/abs/2512.23075; responses with a negative advantage that are:
           DeepSeek-V3.2, https://arxiv.org/abs/2512.02556.
Command    python experiments/ablations/int8_decoding.py
Found      6 minutes at --scale ladder on a core that other work shared.
           sampling in 8 bits costs the policy reward: not decided (reward of the trained policy
           -.008, 95 % interval -.025 to +.010).
           truncated weights repair it: not decided (reward of the trained policy +.017, 95 %
           interval -.005 to +.039).
           leaving out tokens repairs it: not decided (reward of the trained policy +.000, 95 %
           interval -.001 to +.002).
           the off-policy mask repairs it: not decided (reward of the trained policy +.021, 95 %
           interval -.014 to +.055).
           10 minutes at --scale small on a core that other work shared.
           sampling in 8 bits costs the policy reward: not decided (reward of the trained policy
           -.004, 95 % interval -.028 to +.020).
           truncated weights repair it: not decided (reward of the trained policy -.001, 95 %
           interval -.009 to +.007).
           leaving out tokens repairs it: not decided (reward of the trained policy +.003, 95 %
           interval -.008 to +.013).
           the off-policy mask repairs it: not decided (reward of the trained policy +.004, 95 %
           interval -.006 to +.015).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

WEIGHTS, REJECTION, OFF_POLICY = (
    "https://fengyao.notion.site/off-policy-rl",
    "https://arxiv.org/abs/2512.23075",
    "https://arxiv.org/abs/2512.02556",
)
FREE = {"value_loss": "none", "advantage": "rloo", "group_size": 8, "old_logprobs": "scorer"}
INT8 = {**FREE, "decode_dtype": "int8"}
# The papers' bounds, for large networks, would leave out nothing here. At --scale ladder, where the
# largest ratio is off by 2 %, nor do these.
BOUNDS = {"rejection_low": 0.95, "rejection_high": 1.05}
QUESTION = Question(
    "int8_decoding",
    {
        "float32": Arm(FREE),
        "int8": Arm(INT8),
        "int8, truncated weights": Arm({**INT8, "correction": "truncated"}),
        "int8, tokens left out": Arm({**INT8, "rejection": "token_k1", **BOUNDS}),
        "int8, off-policy mask": Arm({**INT8, "off_policy_threshold": 0.01}),
    },
    (
        Claim("sampling in 8 bits costs the policy reward", WEIGHTS, "float32", "int8", "score"),
        Claim("truncated weights repair it", WEIGHTS, "int8, truncated weights", "int8", "score"),
        Claim("leaving out tokens repairs it", REJECTION, "int8, tokens left out", "int8", "score"),
        Claim(
            "the off-policy mask repairs it", OFF_POLICY, "int8, off-policy mask", "int8", "score"
        ),
    ),
    ("end", "score", "first_ratio_off"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
