"""Train a reward model on pairs of texts, one better than the other; or a policy, by DPO.

Question   How often does a language model with a value head tell the better of two texts that it has not seen?
Method     Bradley-Terry (https://arxiv.org/abs/2203.02155); --dpo trains a policy on the pairs instead (https://arxiv.org/abs/2305.18290).
Command    python experiments/reward_model.py --data pairs.jsonl   # {"prompt": "...", "better": "...", "worse": "..."} a line
Data       Without --data: review sentences whose human ratings differ by 2 or more; a tenth is held out.
"""

from dataclasses import dataclass
from pathlib import Path

from jaxppo import cli
from jaxppo.config import RunConfig


@dataclass(frozen=True)
class RewardModel(RunConfig):
    name: str = "reward_model"
    prompt_length: int = 1
    response_length: int = 39
    batch_size: int = 32
    minibatches: int = 1
    steps: int = 200
    lr: float = 3e-4
    dtype: str = "bfloat16"
    eval_every: int = 25
    patience: int = 3
    data: Path | None = None
    """pairs, one JSON object with "prompt", "better" and "worse" a line; default: rated review sentences"""
    margin: float = 0.0
    """by which the better text's score must be higher"""
    centring: float = 0.01
    """weight of the squared sum of a pair's scores, which holds their mean at 0"""
    dpo: bool = False
    """train the language model itself on the pairs, by direct preference optimisation"""
    dpo_beta: float = 0.1
    """how strongly DPO holds to the reference"""


def pairs_of_reviews(seed: int) -> list[tuple[str, str, str]]:
    """Each sentence once: the best rated against the worst, neighbours in a shuffled order whose ratings differ enough."""
    import numpy as np

    from jaxppo.data import sentiment

    reviews = sentiment.load()
    order = np.random.default_rng(seed).permutation(len(reviews))
    out = []
    for one, other in zip(order[0::2], order[1::2]):
        if abs(reviews.ratings[one] - reviews.ratings[other]) >= 2:
            better, worse = (one, other) if reviews.ratings[one] > reviews.ratings[other] else (other, one)
            out.append(("", reviews.texts[better], reviews.texts[worse]))
    return out


def main(options: RewardModel) -> None:
    from jaxppo import config, supervised, tracking, train, validation
    from jaxppo.data import jsonl, rows

    config.validate_run(options)
    train.use_compilation_cache()
    folder = tracking.run_folder(options.runs, options.name, resume=options.resume)
    if options.data is not None:
        found = jsonl.read(options.data, strings=("better", "worse"))
        triples = [(row.get("prompt", ""), row["better"], row["worse"]) for _, row in found]
    else:
        triples = pairs_of_reviews(seed=0)
    options, policy = train.load_policy(options)
    parts = rows.held_out([" ".join(triple) for triple in triples], 0.1)
    training, held_out = (
        rows.preferences([triples[i] for i in part], policy.tokenizer.encode, options.length, eos=policy.tokenizer.eos_id)
        for part in parts
    )
    if options.dpo:
        objective = supervised.dpo(policy.model, options, beta=options.dpo_beta)
    else:
        objective = supervised.bradley_terry(policy.model, margin=options.margin, centring=options.centring)
    evaluate = validation.held_out(options, policy, objective, held_out)
    state = train.fit(options, policy, objective, training, folder=folder, evaluate=evaluate)
    best = train.best(folder, state)
    found = evaluate(best)
    print(f"{len(held_out)} held-out pairs: accuracy {found['accuracy']:.3f} at step {int(best.step)}; checkpoints in {folder}")


if __name__ == "__main__":
    cli.script(main, RewardModel)
