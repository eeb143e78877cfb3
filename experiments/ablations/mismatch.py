"""A sampler that differs from the policy, and what importance correction repairs.

Question   The sampler is made hotter, or its weights and last hidden states are rounded to
           bfloat16, and the scorer does not know. How much is lost, and how much does a truncated
           importance weight bring back? The judge samples from the policy, not from the changed
           sampler. `first_ratio_off` is the largest |scorer / sampler - 1| here.
Paper      https://fengyao.notion.site/off-policy-rl; on precision:
           https://arxiv.org/abs/2510.26788.
Command    python experiments/ablations/mismatch.py
Found      4 minutes at --scale ladder on a core that other work shared.
           a hot sampler costs the policy reward: not decided (reward of the trained policy -.000,
           95 % interval -.031 to +.030).
           correction repairs a hot sampler: not decided (reward of the trained policy +.024, 95 %
           interval -.003 to +.050).
           a sampler in bfloat16 costs the policy reward: disagrees (reward of the trained policy
           -.023, 95 % interval -.039 to -.008).
           10 minutes at --scale small on a core that other work shared.
           a hot sampler costs the policy reward: agrees (reward of the trained policy +.056, 95 %
           interval +.030 to +.081).
           correction repairs a hot sampler: not decided (reward of the trained policy -.010, 95 %
           interval -.034 to +.013).
           a sampler in bfloat16 costs the policy reward: not decided (reward of the trained policy
           -.000, 95 % interval -.017 to +.016).
"""

import jax
from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question


def sampler(*, states, weights=None):
    """A change of the model's last hidden states, and of its weights, while it decodes: what the
    scorer computes stays.
    """

    def other(model):
        def apply(params, tokens, attend, *, cache=None, **rest):
            if cache is None:
                return model.apply(params, tokens, attend, **rest)
            params = params if weights is None else jax.tree.map(weights, params)
            hidden, new = model.apply(params, tokens, attend, cache=cache, **rest)
            return states(hidden), new

        return model._replace(apply=apply)

    return other


PAPER = "https://fengyao.notion.site/off-policy-rl"
rounded = lambda x: x.astype("bfloat16").astype(x.dtype)
HOT, ROUNDED = sampler(states=lambda hidden: hidden / 1.5), sampler(states=rounded, weights=rounded)
# A critic would be fed the changed states. The old log-probs are the scorer's own, as where
# sampler and trainer are two programs.
FREE = {"value_loss": "none", "advantage": "rloo", "group_size": 8, "old_logprobs": "scorer"}
TRUNCATED = {**FREE, "correction": "truncated"}
QUESTION = Question(
    "mismatch",
    {
        "none": Arm(FREE),
        "temperature 1.5": Arm(FREE, model=HOT),
        "temperature 1.5, corrected": Arm(TRUNCATED, model=HOT),
        "bfloat16": Arm(FREE, model=ROUNDED),
        "bfloat16, corrected": Arm(TRUNCATED, model=ROUNDED),
    },
    (
        Claim("a hot sampler costs the policy reward", PAPER, "none", "temperature 1.5", "score"),
        Claim(
            "correction repairs a hot sampler",
            PAPER,
            "temperature 1.5, corrected",
            "temperature 1.5",
            "score",
        ),
        Claim(
            "a sampler in bfloat16 costs the policy reward",
            "https://arxiv.org/abs/2510.26788",
            "none",
            "bfloat16",
            "score",
        ),
    ),
    ("end", "score", "first_ratio_off"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
