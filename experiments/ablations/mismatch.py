"""A sampler that is not quite the policy, and what importance correction repairs.

Question   The sampler is made hotter, or rounded to bfloat16, behind the scorer's back. How much is lost, and how
           much does a truncated importance weight bring back? The policies are judged by samples of their own, not by
           the changed sampler's.
Paper      https://fengyao.notion.site/off-policy-rl; on precision: https://arxiv.org/abs/2510.26788.
Command    python experiments/ablations/mismatch.py
"""

from scales import AblationConfig, Arm, Claim, Question, run

from jaxppo import cli


def sampler(change):
    """A change of the model while it decodes: what the scorer computes stays as it was."""

    def other(model):
        def apply(params, tokens, attend, *, cache=None, **rest):
            hidden, new = model.apply(params, tokens, attend, cache=cache, **rest)
            return (hidden if cache is None else change(hidden)), new

        return model._replace(apply=apply)

    return other


def rescored(parts):
    """The old log-probs are the scorer's own, as where sampler and trainer are two programs."""
    from jaxppo import policy
    from jaxppo.models import lora
    from jaxppo.update import make_update

    def make(model, parts, config, *, axis_name=None):
        update = make_update(model, parts, config, axis_name=axis_name)

        def again(state, batch, key):
            whole = lora.merge(state.frozen["base"], state.params)
            scores = policy.score(model, whole, batch.rollout, config=config, with_values=False)
            return update(state, batch.replace(old_logprobs=scores.logprobs * batch.rollout.mask), key)

        return again

    return parts._replace(update=make)


PAPER = "https://fengyao.notion.site/off-policy-rl"
HOT, ROUNDED = sampler(lambda hidden: hidden / 1.5), sampler(lambda hidden: hidden.astype("bfloat16").astype(hidden.dtype))
FREE = {"value_loss": "none", "advantage": "rloo", "group_size": 8}  # a critic would be fed the changed states
TRUNCATED = {**FREE, "correction": "truncated"}
QUESTION = Question(
    "mismatch",
    {
        "none": Arm(FREE, rescored),
        "temperature 1.5": Arm(FREE, rescored, HOT),
        "temperature 1.5, corrected": Arm(TRUNCATED, rescored, HOT),
        "bfloat16": Arm(FREE, rescored, ROUNDED),
        "bfloat16, corrected": Arm(TRUNCATED, rescored, ROUNDED),
    },
    (
        Claim("a hot sampler costs the policy reward", PAPER, "none", "temperature 1.5", "score"),
        Claim("correction repairs a hot sampler", PAPER, "temperature 1.5, corrected", "temperature 1.5", "score"),
        Claim("a sampler in bfloat16 costs the policy reward", "https://arxiv.org/abs/2510.26788", "none", "bfloat16", "score"),
    ),
    ("end", "score", "first_ratio_off"),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
