"""Train a small language model from scratch: a vocabulary, next-token prediction, and a checkpoint
for the other scripts.

Command    python experiments/pretrain.py
           # --data texts.jsonl, a line each: {"text": "..."}; --model-kind gru
           then: python experiments/sentiment.py --model runs/pretrain/model --lora 0
Minutes    6 to 7 on one core of an AMD EPYC that other work shared (JAX 0.10.2), without download.
Data       Without --data: the review sentences of `jaxppo.data.sentiment`; a tenth is held out.
           Nine in ten of the main job's test sentences are in the training set, so its result then
           does not measure new text.
Expected   Held-out perplexity of three seeds: 166.8, 173.6 and 167.7 a token (4,000 tokens in the
           vocabulary).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import jax
import numpy as np

from jaxppo import cli, models, pretrained, supervised, train
from jaxppo.config import RunConfig
from jaxppo.data import jsonl, prompts, rows, sentiment
from jaxppo.data.examples import drop_duplicates
from jaxppo.models import shapes
from jaxppo.parallel import processes
from jaxppo.pretrained import vocabulary
from jaxppo.run import files, load, resume, validation
from jaxppo.run.start import check_run


@dataclass(frozen=True)
class Pretrain(RunConfig):
    RANGES: ClassVar = {
        **dict.fromkeys(("max_vocab", "width", "layers", "repeat"), "(0, inf)"),
        "dropout": "[0, 1)",
    }

    name: str = "pretrain"
    layout: str = "dense"  # rows are cut from one stream, and full
    prompt_length: int = 1
    response_length: int = 63
    batch_size: int = 32
    minibatches: int = 1
    steps: int = 600
    lr: float = 3e-3
    lr_schedule: str = "cosine"
    lr_warmup: int = 30
    optimizer: str = "adamw"
    lora: int = 0
    value_loss: str = "none"
    eval_every: int = 50
    patience: int = 3
    data: Path | None = None
    """texts, one JSON object with "text" a line; default: review sentences"""
    tokens: Literal["bpe", "words"] = "bpe"
    """bpe: byte pairs; words: whole words in lower case"""
    max_vocab: int = 4000
    """most tokens of the vocabulary"""
    width: int = 128
    """of the hidden states"""
    layers: int = 4
    """of the network"""
    dropout: float = 0.1
    """of embeddings and last hidden states"""
    vectors: Path | None = None
    """pretrained word vectors in GloVe's text format, of this width"""
    repeat: int = 1
    """copies of each text; all but one have words dropped and swapped with probability .1"""
    results: str = ""
    """folder that gets a copy of the result, as pretrain/<name>.json; empty = none"""


def main(options: Pretrain) -> None:
    check_run(options, supervised=True)
    load.use_compilation_cache()
    resume.check_early(options, but=("model", "tiny"))
    folder = files.run_folder(options.runs, options.name, resume=options.resume)
    if options.data is None:
        texts = sentiment.load_reviews().texts
    else:
        texts = [row["text"] for _, row in jsonl.read(options.data, strings=("text",))]
    texts = drop_duplicates(texts, "texts")
    training, held_out = (
        [texts[i] for i in part] for part in rows.train_validation_split(texts, 0.1)
    )
    rng = np.random.default_rng(options.seed)
    training += [
        rows.add_word_noise(text, rng, drop=0.1, swap=0.1)
        for text in training
        for _ in range(options.repeat - 1)
    ]

    start = (
        folder / "start"
    )  # the random network and its vocabulary, as a checkpoint like any other
    if not start.exists() and processes.is_main():
        make = {"bpe": vocabulary.train_bpe, "words": vocabulary.train_words}[options.tokens]
        tokenizer = make(training, options.max_vocab)
        sizes = {"width": options.width, "num_layers": options.layers, "dropout": options.dropout}
        shape = shapes.network(options.model_kind, vocab_size=tokenizer.vocab_size, **sizes)
        params = {
            name: x
            for name, x in models.make(shape).init(jax.random.key(options.seed)).items()
            if name != "value"
        }
        if options.vectors is not None:
            embedding, found = vocabulary.load_word_vectors(
                options.vectors, tokenizer, options.width, seed=options.seed
            )
            print(f"word vectors: {found} of {tokenizer.vocab_size} tokens")
            params["embed"] = {"embedding": embedding}
        pretrained.save(start, shape, jax.device_get(params), tokenizer)
    processes.wait_for_all("start")
    options = replace(options, model=str(start), tiny=False)
    options, policy = load.load_policy(options)
    first, eos = prompts.start_token(options, policy.tokenizer), policy.tokenizer.eos_id
    pack = lambda some: rows.pack(
        some, policy.tokenizer.encode, options.length, eos=eos, start=first
    )
    objective = supervised.language_model(policy.model, options)
    evaluate = validation.make_validation(options, policy, objective, pack(held_out))
    state = train.fit(options, policy, objective, pack(training), folder=folder, evaluate=evaluate)

    best = load.restore_best(folder, state)
    found = evaluate(best) | {
        "step": int(best.step),
        "held_out_texts": len(held_out),
        "vocabulary": policy.tokenizer.vocab_size,
    }
    load.save_model(options, policy, best, folder / "model")
    asked = replace(options, model="")  # not the random start
    files.write_result(folder, asked, found, results=options.results, kind="pretrain")
    print(
        f"held-out perplexity {found['perplexity']:.1f} a token, accuracy of tokens "
        f"{found['token_accuracy']:.3f}, at step {found['step']}; written to {folder / 'model'}"
    )


if __name__ == "__main__":
    cli.script(main, Pretrain)
