"""Whitening of advantages and rewards: over the batch, over a group, or not at all.

Question   Does it matter which values get mean 0 and variance 1?
Paper      https://arxiv.org/abs/2005.12729 (implementation matters in deep policy gradients), on
           rewards over their running deviation; REINFORCE++, https://arxiv.org/abs/2501.03262.
Changed    The first paper was cited for whitened advantages, of which it says nothing; the claim on
           the running deviation, which it makes, was added after the runs.
Command    python experiments/ablations/whitening.py
Found      3 minutes at --scale ladder on a core that other work shared.
           whitened advantages beat plain ones: not decided (reward of all steps +.002, 95 %
           interval -.017 to +.021).
           scores over their running deviation beat plain ones: disagrees (reward of all steps
           -.086, 95 % interval -.101 to -.071).
           whitened token rewards beat plain ones: disagrees (reward of all steps -.069, 95 %
           interval -.082 to -.057).
           scores of mean 0 and deviation 1 beat plain ones: not decided (reward of all steps +.015,
           95 % interval +.001 to +.030).
           the batch's deviation beats each group's own: not decided (reward of all steps +.007, 95
           % interval -.015 to +.028).
           15 minutes at --scale small on a core that other work shared.
           whitened advantages beat plain ones: disagrees (reward of all steps -.026, 95 % interval
           -.032 to -.020).
           scores over their running deviation beat plain ones: agrees (reward of all steps +.004,
           95 % interval +.001 to +.007).
           whitened token rewards beat plain ones: disagrees (reward of all steps -.010, 95 %
           interval -.015 to -.005).
           scores of mean 0 and deviation 1 beat plain ones: disagrees (reward of all steps -.022,
           95 % interval -.029 to -.015).
           the batch's deviation beats each group's own: not decided (reward of all steps -.002, 95
           % interval -.005 to +.001).
"""

from scales import run

from jaxppo import cli
from jaxppo.ablation.question import AblationConfig, Arm, Claim, Question

ALIKE = {"group_size": 8}  # the same prompts for all
FREE = {**ALIKE, "value_loss": "none"}
QUESTION = Question(
    "whitening",
    {
        "advantages over the batch": Arm({**ALIKE, "whiten_advantages": True}),
        "not at all": Arm({**ALIKE, "whiten_advantages": False}),
        "scale alone": Arm({**ALIKE, "whiten_advantages": True, "whiten_shift": False}),
        "token rewards": Arm({**ALIKE, "whiten_advantages": False, "whiten_rewards": True}),
        "scores over the batch": Arm({**ALIKE, "whiten_advantages": False, "reward_norm": "batch"}),
        "scores over their running deviation": Arm(
            {**ALIKE, "whiten_advantages": False, "reward_norm": "running"}
        ),
        "each group": Arm({**FREE, "advantage": "group"}),
        "group's mean, batch's deviation": Arm(
            {**FREE, "advantage": "reinforce_plus_plus_baseline"}
        ),
    },
    (
        Claim(
            "whitened advantages beat plain ones",
            "",
            "advantages over the batch",
            "not at all",
            "area",
        ),
        Claim(
            "scores over their running deviation beat plain ones",
            "https://arxiv.org/abs/2005.12729",
            "scores over their running deviation",
            "not at all",
            "area",
        ),
        Claim("whitened token rewards beat plain ones", "", "token rewards", "not at all", "area"),
        Claim(
            "scores of mean 0 and deviation 1 beat plain ones",
            "",
            "scores over the batch",
            "not at all",
            "area",
        ),
        Claim(
            "the batch's deviation beats each group's own",
            "https://arxiv.org/abs/2501.03262",
            "group's mean, batch's deviation",
            "each group",
            "area",
        ),
    ),
)


def main(options: AblationConfig) -> None:
    run(QUESTION, options)


if __name__ == "__main__":
    cli.script(main, AblationConfig)
