"""Fine-tune a language model on prompts with responses: the loss is on the response.

Command    python experiments/sft.py
           # --data pairs.jsonl, a line each: {"prompt": "...", "response": "..."}
           then: python experiments/sentiment.py --model runs/sft/model
Data       Without --data: the first 8 words of the review sentences that people rated above +1 as
           prompts, and the rest as responses: a warm-up of the main job. Only sentences of its
           training set are used. A tenth of --data is held out.
Expected   Perplexity of held-out responses after 100 steps, three seeds: 48.2, 48.2 and 47.9 a
           token (20 to 27 minutes on one core of a CPU without a unit for bfloat16).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from jaxppo import cli, supervised, train
from jaxppo.config import RunConfig
from jaxppo.data import jsonl, prompts, rows, sentiment
from jaxppo.data.examples import drop_duplicates
from jaxppo.run import files, load, resume, validation
from jaxppo.run.start import check_run


@dataclass(frozen=True)
class Sft(RunConfig):
    RANGES: ClassVar = {"buckets": "(0, inf)", "dropout": "[0, 1)"}

    name: str = "sft"
    prompt_length: int = 12
    response_length: int = 36
    batch_size: int = 16
    minibatches: int = 1
    steps: int = 100
    lr: float = 3e-4
    dtype: str = "bfloat16"
    value_loss: str = "none"
    eval_every: int = 25
    patience: int = 3
    dropout: float = 0.0
    """of embeddings and last hidden states"""
    data: Path | None = None
    """pairs, one JSON object with "prompt" and "response" a line; default: positive reviews, cut
    after 8 words
    """
    buckets: int = 1
    """batches whose rows are sorted by length together: less padding, but one program for each
    width
    """
    results: str = ""
    """folder that gets a copy of the result, as sft/<name>.json; empty = none"""


def openings(texts: list[str], words: int = 8) -> list[tuple[str, str]]:
    """(the first words, the rest) of each text that is long enough."""
    split = [text.split() for text in texts]
    return [
        (" ".join(some[:words]), " " + " ".join(some[words:]))
        for some in split
        if len(some) > words + 2
    ]


def main(options: Sft) -> None:
    check_run(options, supervised=True)
    load.use_compilation_cache()
    resume.check_early(options)
    folder = files.run_folder(options.runs, options.name, resume=options.resume)
    options, policy = load.load_policy(options, dropout=options.dropout)
    encode = policy.tokenizer.encode
    if options.data is not None:
        found = jsonl.read(options.data, strings=("prompt", "response"))
        pairs = [(row["prompt"], row["response"]) for _, row in found]
        pairs = drop_duplicates(pairs, "pairs")
        parts = [
            [pairs[i] for i in part]
            for part in rows.train_validation_split([prompt for prompt, _ in pairs], 0.1)
        ]
    else:
        reviews = sentiment.load_reviews()
        split = sentiment.split_by_opening(
            reviews.texts, encode
        )  # the main job's: its test sentences are not learned
        parts = [
            openings([reviews.texts[i] for i in part if reviews.ratings[i] > 1])
            for part in split[:2]
        ]
    last = options.response_length
    start = prompts.start_token(options, policy.tokenizer)
    replies = lambda part: rows.responses(
        part, encode, options.length, eos=policy.tokenizer.eos_id, longest=last, start=start
    )
    training, held_out = (replies(part) for part in parts)
    training = replace(training, buckets=options.buckets)
    objective = supervised.language_model(policy.model, options, last=last)
    evaluate = validation.make_validation(options, policy, objective, held_out)
    state = train.fit(options, policy, objective, training, folder=folder, evaluate=evaluate)

    best = load.restore_best(folder, state)
    load.save_model(options, policy, best, folder / "model")
    found = evaluate(best) | {"step": int(best.step), "held_out_pairs": len(held_out)}
    files.write_result(folder, options, found, results=options.results, kind="sft")
    print(
        f"held-out perplexity {found['perplexity']:.2f} a token, accuracy of tokens "
        f"{found['token_accuracy']:.3f}, at step {found['step']}; written to {folder / 'model'}"
    )


if __name__ == "__main__":
    cli.script(main, Sft)
