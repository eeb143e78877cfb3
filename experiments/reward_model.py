"""Train a reward model on pairs of texts or on labelled texts; or a policy on pairs, by DPO.

Question   How often does a language model with a value head prefer the better of two new texts?
Method     Bradley-Terry (https://arxiv.org/abs/2203.02155); --dpo trains a policy on the pairs
           instead (https://arxiv.org/abs/2305.18290).
Command    python experiments/reward_model.py
           # --data pairs.jsonl, a line each: {"prompt": "...", "better": "...", "worse": "..."}
           # --labels --data texts.jsonl, a line each: {"text": "...", "label": 0.9}, the
           # probability that the text is good
           then: python experiments/sentiment.py --reward model --reward-model runs/reward_model
           (also for the tasks and jaxppo train); after --dpo: --model runs/reward_model/model
Data       Without --data: review sentences whose human ratings differ by 2 or more (with --labels:
           all of them, with the probability sigmoid(rating)). A tenth chooses the best checkpoint,
           and another tenth is the test. The split is by prompt, if there are prompts. A third of
           the main job's test sentences are in the training set.
Expected   .836, .840 and .799 of 268 test pairs, three seeds (+- .023 each, from their number;
           --dtype float32; 9 to 11 minutes on a core that other work shared).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from jaxppo import cli, supervised, train
from jaxppo.config import RunConfig
from jaxppo.data import jsonl, rows, sentiment
from jaxppo.data.examples import drop_duplicates
from jaxppo.errors import UserError
from jaxppo.run import files, load, resume, validation
from jaxppo.run.policy import own_start
from jaxppo.run.start import check_run


@dataclass(frozen=True)
class RewardModel(RunConfig):
    RANGES: ClassVar = {
        **dict.fromkeys(("margin", "centring"), "[0, inf)"),
        "dropout": "[0, 1)",
        "dpo_beta": "(0, inf)",
    }

    name: str = "reward_model"
    prompt_length: int = 1
    response_length: int = 39
    batch_size: int = 16
    minibatches: int = 1
    steps: int = 100
    lr: float = 3e-4
    dtype: str = "bfloat16"
    eval_every: int = 25
    patience: int = 3
    dropout: float = 0.0
    """of embeddings and last hidden states"""
    data: Path | None = None
    """pairs, one JSON object with "prompt", "better" and "worse" a line; default: rated review
    sentences
    """
    margin: float = 0.0
    """the better text's score must be higher by this much"""
    centring: float = 0.01
    """weight of the squared sum of a pair's scores, which keeps their mean near 0"""
    labels: bool = False
    """learn from texts with the probability that each is good, not from pairs"""
    dpo: bool = False
    """train the language model itself on the pairs, by direct preference optimisation"""
    dpo_beta: float = 0.1
    """DPO's beta: how strongly the policy is held to the reference"""
    results: str = ""
    """folder that gets a copy of the result, as reward_model/<name>.json or dpo/<name>.json;
    empty = none
    """


def pairs_of_reviews(seed: int) -> list[tuple[str, str, str]]:
    """("", better, worse): neighbours in a shuffled order whose ratings differ by 2 or more; each
    sentence is used once.
    """
    reviews = sentiment.load_reviews()
    order = np.random.default_rng(seed).permutation(len(reviews))
    out = []
    for one, other in zip(order[0::2], order[1::2]):
        if abs(reviews.ratings[one] - reviews.ratings[other]) >= 2:
            better, worse = (
                (one, other) if reviews.ratings[one] > reviews.ratings[other] else (other, one)
            )
            out.append(("", reviews.texts[better], reviews.texts[worse]))
    return out


def pairs(options: RewardModel, policy) -> list:
    """Rows of pairs for training, validation and test."""
    if options.data is not None:
        found = list(jsonl.read(options.data, strings=("better", "worse")))
        for line, row in found:
            if not isinstance(row.get("prompt", ""), str):
                raise UserError(
                    f"{options.data}, line {line}: prompt is {row['prompt']!r}, "
                    "but must be a text, or left out"
                )
        triples = [(row.get("prompt", ""), row["better"], row["worse"]) for _, row in found]
        triples = drop_duplicates(triples, "pairs")
    else:
        triples = pairs_of_reviews(seed=0)
    parts = rows.split_in_three(
        [prompt or " ".join((better, worse)) for prompt, better, worse in triples]
    )  # a prompt's pairs stay together
    encode, eos = policy.tokenizer.encode, policy.tokenizer.eos_id
    start = own_start(options, policy.tokenizer)
    return [
        rows.preferences([triples[i] for i in part], encode, options.length, eos=eos, start=start)
        for part in parts
    ]


def labelled(options: RewardModel, policy) -> list:
    """Rows of labelled texts for training, validation and test."""
    if options.data is not None:
        found = list(jsonl.read(options.data, strings=("text",)))
        for line, row in found:
            label = row.get("label")
            if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
                raise UserError(
                    f"{options.data}, line {line}: label is {label!r}, "
                    "but must be a probability between 0 and 1"
                )
        kept = drop_duplicates([(row["text"], row["label"]) for _, row in found], "labelled texts")
        texts, labels = (
            [text for text, _ in kept],
            np.asarray([label for _, label in kept], np.float32),
        )
    else:
        reviews = sentiment.load_reviews()
        texts, labels = reviews.texts, 1 / (1 + np.exp(-reviews.ratings))
    encode, eos = policy.tokenizer.encode, policy.tokenizer.eos_id
    start = own_start(options, policy.tokenizer)
    parts = rows.split_in_three(texts)
    return [
        rows.labelled(
            [texts[i] for i in part], labels[part], encode, options.length, eos=eos, start=start
        )
        for part in parts
    ]


def main(options: RewardModel) -> None:
    check_run(options, supervised=True)
    if options.labels and options.dpo:
        raise UserError("--dpo learns from pairs: leave --labels out")
    load.use_compilation_cache()
    resume.check_early(options)
    folder = files.run_folder(options.runs, options.name, resume=options.resume)
    options, policy = load.load_policy(options, dropout=options.dropout)
    training, held_out, test = (
        labelled(options, policy) if options.labels else pairs(options, policy)
    )
    if options.dpo:
        objective = supervised.dpo(policy.model, options, beta=options.dpo_beta)
    elif options.labels:
        objective = supervised.binary_cross_entropy(policy.model)
    else:
        objective = supervised.bradley_terry(
            policy.model, margin=options.margin, centring=options.centring
        )
    judge = lambda part: validation.make_validation(options, policy, objective, part)
    state = train.fit(options, policy, objective, training, folder=folder, evaluate=judge(held_out))
    best = load.restore_best(folder, state)
    found = judge(test)(best)
    if options.dpo:
        load.save_model(options, policy, best, folder / "model")
    what = "texts" if options.labels else "pairs"
    result = {
        "test_accuracy": found["accuracy"],
        "test_loss": found["loss"],
        f"test_{what}": len(test),
        "step": int(best.step),
    }
    kind = "dpo" if options.dpo else "reward_model"
    files.write_result(folder, options, result, results=options.results, kind=kind)
    print(
        f"{len(test)} test {what}: accuracy {found['accuracy']:.3f} at step {int(best.step)}; "
        f"written to {folder}"
    )


if __name__ == "__main__":
    cli.script(main, RewardModel)
