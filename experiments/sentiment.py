"""Train a language model to continue movie reviews positively, without losing its English. (The
main job.)

Question   How far does held-out sentiment rise for a given distance from the reference model?
Method     PPO (https://arxiv.org/abs/1707.06347) with the adaptive KL penalty of https://arxiv.org/abs/1909.08593; LoRA.
Command    python experiments/sentiment.py                     # --reward vader; --seed 1; --lora 0
           With a supervised warm-up on positive reviews first: python experiments/sft.py --name
           warmup, and then python experiments/sentiment.py --name warm --model runs/warmup/model
Minutes    11.5 on two CPU cores that did other work too (JAX 0.10.2), downloads excluded.
Protocol   The first 8 tokens of 256 test sentences, 24 new tokens, temperature 1, two sampling seeds. The judge, VADER, reads
           the continuation alone. KL is the mean over continuations of the summed k1. Distinct-2 at
           equal numbers of tokens. Settings were chosen on validation prompts.
Expected   Three training seeds, mean +- standard error over seeds, judge before +.140:
             classifier   gain +.455 +- .015 (.445 .436 .484) at 5.63 +- .23 nats, distinct-2 .922 +- .005 of the reference's
             after a warm-up  gain +.482 +- .004 (.488 .485 .473) at 5.31 +- .17 nats; paired with the first: +.027, 95 % interval
                          -.054 to +.108, not decided (61 to 81 minutes each on one core without a
                          unit for bfloat16)
             vader        gain +.582 +- .013 (.569 .608 .570) at 5.61 +- .24 nats, distinct-2 .929 +- .007 (judge = reward)
"""

from dataclasses import dataclass
from typing import Literal

from jaxppo import algorithms, cli, config, ppo, train
from jaxppo.config import RunConfig
from jaxppo.data import prompts, sentiment
from jaxppo.models import text_classifier
from jaxppo.parallel import processes
from jaxppo.rewards import classifier, in_program, text
from jaxppo.rewards.host import on_host
from jaxppo.run import checkpoint, files, load, log, sampler

JUDGE_SEEDS = (1001, 1002)


@dataclass(frozen=True)
class Sentiment(RunConfig):
    name: str = "sentiment"
    prompt_length: int = 9
    prompt_start: bool = True
    dtype: str = "bfloat16"
    steps: int = 50
    kl_coef: float = 0.08
    kl_target: float = 6.0
    kl_horizon: float = 500.0
    kl_coef_min: float = 0.03
    eval_every: int = 10
    save_every: int = 10
    logits_bytes: int = (
        80 * 2**20
    )  # one minibatch's logits, 16 x 24 x 49152 in float32, are not computed twice
    reward: Literal["classifier", "vader", "model"] = "classifier"
    """classifier: trained here on the labelled sentences, in the compiled step; vader: VADER on
    decoded text, on the host; model: the score of --reward-model, in the compiled step
    """
    reward_scale: float = 1.0
    """factor of the classifier's 2 p(positive) - 1, of VADER's compound (both are in [-1, 1]) or of
    the model's score
    """
    test_prompts: int = 256
    """held-out prompts that the judge reads before and after"""
    results: str = ""
    """folder that keeps a copy of the numbers, as sentiment/<name>.json; empty = none is made"""


def main(options: Sentiment) -> None:
    import dataclasses

    import jax

    config.validate_run(options)
    algorithms.check(options)  # a wrong name is found before anything is loaded
    load.use_compilation_cache()
    folder = files.run_folder(options.runs, options.name, resume=options.resume)
    if options.tiny:
        options = dataclasses.replace(options, test_prompts=8, batch_size=8, response_length=8)
    options, policy = load.load_policy(options)

    reviews, parts, encode = load_prompts(options, policy)
    training, validation, test = (
        encode(parts.train),
        encode(parts.validation[:128]),
        encode(parts.test[: options.test_prompts]),
    )

    reward, policy.frozen["reward"], accuracy = make_reward(options, policy, reviews, parts, folder)
    judge = Judge(options, policy)

    untrained = ppo.init_state(options, policy.params, policy.frozen, jax.random.key(options.seed))
    before = [judge.read(untrained, test, seed) for seed in JUDGE_SEEDS]
    del untrained  # its moments
    state = train.fit(
        options,
        policy,
        algorithms.make_parts(options, reward),
        training,
        folder=folder,
        evaluate=lambda state: judge.numbers(judge.read(state, validation, JUDGE_SEEDS[0])),
    )
    best = load.best(folder, state)  # what jaxppo sample, eval and export take
    after = [judge.read(best, test, seed) for seed in JUDGE_SEEDS]
    if processes.is_main():
        report(options, folder, int(best.step), before, after, accuracy)


def load_prompts(options: Sentiment, policy):
    """(reviews, their split, what makes prompts of some): the first tokens of each sentence, after
    the one that starts a document. Sentences that begin alike fall into the same part of the split,
    which is the same for every seed.
    """

    reviews = sentiment.load()
    if options.tiny:
        reviews = sentiment.Reviews(reviews.texts[::40], reviews.ratings[::40])
    parts = sentiment.split_by_opening(reviews.texts, policy.tokenizer.encode)
    start = prompts.start_token(options, policy.tokenizer)
    encode = lambda rows: prompts.encode(
        [reviews.texts[i] for i in rows],
        policy.tokenizer,
        options.prompt_length,
        too_long="first",
        start=start,
    )
    return reviews, parts, encode


def make_reward(options: Sentiment, policy, reviews, parts, folder):
    """(reward function, its parameters, share of test sentences that it reads rightly). The
    classifier is trained once a run, of several processes by the first, and kept in the run's
    folder.
    """

    if options.reward == "vader":
        judge = text.vader()
        return (
            on_host(
                lambda prompt, response: options.reward_scale * judge(response),
                policy.tokenizer.decode_batch,
            ),
            {},
            None,
        )
    if options.reward == "model":
        model, params = load.load_reward_model(options, policy.tokenizer)
        return in_program.learned(model, scale=options.reward_scale), params, None
    net = text_classifier.Classifier()
    embedding = processes.to_host(
        (policy.frozen["base"] or policy.frozen["reference"])["embed"]["embedding"]
    )
    labelled = classifier.Labelled.encode(reviews.texts, reviews.ratings, policy.tokenizer.encode)
    path = folder / "reward"
    with processes.main_first("reward"):
        if path.exists():
            params = checkpoint.load_once(path, classifier.init(net, embedding, seed=options.seed))
        else:
            texts = labelled.rows(parts.train).with_windows(
                least=12, most=options.response_length, seed=options.seed
            )
            params = classifier.fit(net, embedding, texts, seed=options.seed, say=print)
            checkpoint.save_once(path, params)
    params = {"embedding": embedding, "net": params}
    share = classifier.accuracy(net, params, labelled.rows(parts.test), beyond=0.5)
    print(f"reward model: {share:.3f} of test sentences right (human rating beyond +-0.5)")
    return classifier.reward(net, scale=options.reward_scale), params, share


class Judge:
    """VADER on continuations alone; nothing was trained on it (unless it is the reward)."""

    def __init__(self, options: Sentiment, policy):

        self.sentiment = text.vader()
        self.sampler = sampler.Sampler(options, policy, rows=min(64, options.test_prompts))

    def read(self, state, prompts, seed: int) -> list:
        """Samples with the judge's opinion: [(sample, sentiment)]."""
        return [
            (sample, self.sentiment(sample.response))
            for sample in self.sampler(state, prompts, seed=seed)
        ]

    def numbers(self, read: list) -> dict[str, float]:
        """Means over the samples, and `score`: what the run is to raise, held at a KL of 8 nats."""

        kl = sum(sample.kl for sample, _ in read) / len(read)
        mean = sum(opinion for _, opinion in read) / len(read)
        distinct = text.distinct([sample.tokens for sample, _ in read], 2)
        return {
            "sentiment": mean,
            "kl": kl,
            "distinct_2": distinct,
            "score": mean - max(0.0, kl - 8.0),
        }


def report(
    options: Sentiment, folder, step: int, before: list, after: list, accuracy: float | None
) -> None:
    """The table of samples, the numbers with standard errors, and what was written where."""
    import json

    rows = [
        {
            "prompt": b.prompt,
            "before": b.response,
            "sentiment_before": sb,
            "after": a.response,
            "sentiment_after": sa,
            "kl": a.kl,
        }
        for (b, sb), (a, sa) in zip(before[0], after[0], strict=True)
    ]
    with (folder / "samples.jsonl").open("w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    cells = [
        [
            r["prompt"],
            r["before"],
            f"{r['sentiment_before']:+.2f}",
            r["after"],
            f"{r['sentiment_after']:+.2f}",
        ]
        for r in rows[:8]
    ]
    log.table("held-out prompts, continued", ["prompt", "before", "judge", "after", "judge"], cells)

    flat_before, flat_after = before[0] + before[1], after[0] + after[1]
    gains = [sa - sb for (_, sb), (_, sa) in zip(flat_before, flat_after, strict=True)]
    kls = [a.kl for a, _ in flat_after]
    tokens = min(
        sum(len(s.tokens) for s, _ in read) for read in before + after
    )  # the measure falls with the amount of text
    distinct = lambda reads: (
        sum(text.distinct([s.tokens for s, _ in read], 2, tokens=tokens) for read in reads)
        / len(reads)
    )
    mean = lambda values: sum(values) / len(values)
    result = {
        "sentiment_before": mean([s for _, s in flat_before]),
        "sentiment_after": mean([s for _, s in flat_after]),
        "gain": mean(gains),
        "gain_se": text.standard_error(gains),
        "kl": mean(kls),
        "kl_se": text.standard_error(kls),
        "distinct_2_before": distinct(before),
        "distinct_2_after": distinct(after),
        "distinct_2_ratio": distinct(after) / distinct(before),
        "reward_model_accuracy": accuracy,
        "step": step,
    }
    seen = ("step", "validation_kl", "validation_sentiment", "validation_distinct_2")
    validation = [
        {key: row[key] for key in seen}
        for row in files.read_lines(folder / "metrics.jsonl")
        if seen[1] in row
    ]
    files.keep_result(
        folder, options, result, results=options.results, kind="sentiment", validation=validation
    )
    print(
        f"held-out sentiment {result['sentiment_before']:+.3f} -> {result['sentiment_after']:+.3f} "
        f"(gain {result['gain']:+.3f} +- {result['gain_se']:.3f}), KL {result['kl']:.2f} +- {result['kl_se']:.2f} nats a "
        f"continuation, distinct-2 {result['distinct_2_ratio']:.3f} of the reference's"
    )
    print(
        "written: "
        + ", ".join(
            str(folder / name)
            for name in ("result.json", "samples.jsonl", "metrics.jsonl", "curves.png")
        )
    )


if __name__ == "__main__":
    cli.script(main, Sentiment)
