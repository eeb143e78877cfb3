"""Train a language model to continue movie reviews positively while it keeps its English. This is
the main job.

Question   How far does held-out sentiment rise for a given distance from the reference model?
Paper      PPO, https://arxiv.org/abs/1707.06347, with the adaptive KL penalty of
           https://arxiv.org/abs/1909.08593 and LoRA.
Command    python experiments/sentiment.py       # --reward vader; --seed 1; --lora 0
           With a supervised warm-up on positive reviews: python experiments/sft.py --name warmup,
           then python experiments/sentiment.py --name warm --model runs/warmup/model
Minutes    11 to 18 on two CPU cores that did other work too (JAX 0.10.2), without downloads.
Protocol   The first 8 tokens of 256 test sentences, 24 new tokens, temperature 1, two sampling
           seeds. The judge, VADER, reads the continuation alone. KL is the mean over continuations
           of the summed k1. Distinct-2 is computed at equal numbers of tokens. The settings were
           chosen on validation prompts.
Expected   Mean +- standard error over three training seeds, judge before +.09 to +.15:
             classifier        gain +.499 +- .029 (.507 .544 .446) at 5.27 +- .26 nats,
                               distinct-2 .932 +- .006 of the reference's
             after a warm-up   gain +.482 +- .004 (.488 .485 .473) at 5.31 +- .17 nats (61 to 81
                               minutes each on one core without a unit for bfloat16)
             vader             gain +.582 +- .013 (.569 .608 .570) at 5.61 +- .24 nats,
                               distinct-2 .929 +- .007 (the judge is the reward)
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from jaxppo import cli
from jaxppo.config import RunConfig
from jaxppo.data import prompts, sentiment
from jaxppo.data.examples import Split
from jaxppo.parallel import processes
from jaxppo.rewards import in_program, text
from jaxppo.rewards.host import on_host
from jaxppo.run import files, load, resume
from jaxppo.run.policy import Policy
from jaxppo.run.start import check_run
from jaxppo.tasks import judged, rewards
from jaxppo.tasks.judged import Judged
from jaxppo.tasks.optimisation import train_and_measure
from jaxppo.tasks.rewards import Reward

JUDGE_SEEDS = (1001, 1002)


@dataclass(frozen=True)
class Sentiment(RunConfig):
    RANGES: ClassVar = {"reward_scale": "(-inf, inf)", "test_prompts": "(0, inf)"}

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
    # One minibatch's logits, 16 x 24 x 49152 in float32, fit: they are not computed twice.
    logits_bytes: int = 80 * 2**20
    reward: Literal["classifier", "vader", "model"] = "classifier"
    """classifier: trained here on the labelled sentences, in the compiled step; vader: VADER on
    decoded text, on the host; model: the score of --reward-model, in the compiled step
    """
    reward_scale: float = 1.0
    """factor of the classifier's 2 p(positive) - 1, of VADER's compound (both are in [-1, 1]) or of
    the model's score; below 0 for the opposite
    """
    test_prompts: int = 256
    """held-out prompts that the judge reads before and after"""
    results: str = ""
    """folder that gets a copy of the result, as sentiment/<name>.json; empty = none"""


def main(options: Sentiment) -> None:
    check_run(options)
    if options.tiny:
        options = replace(options, test_prompts=8, batch_size=8, response_length=8)
        check_run(options)
    if options.reward == "model":
        load.reward_run(options)
    load.use_compilation_cache()
    resume.check_early(options)
    folder = files.run_folder(options.runs, options.name, resume=options.resume)
    options, policy = load.load_policy(options)
    reviews, split, encode = load_prompts(options, policy)
    reward, accuracy = make_reward(options, policy, reviews, split, folder)
    rows = min(64, options.test_prompts)
    judge = judged.make_judge(options, policy, text.vader(), rows=rows)
    validation, test = encode(split.validation[:128]), encode(split.test[: options.test_prompts])
    before, after, best = train_and_measure(
        options,
        policy,
        reward,
        encode(split.train),
        folder=folder,
        measure=lambda state: [judge(state, test, seed) for seed in JUDGE_SEEDS],
        evaluate=lambda state: judged.summarise(judge(state, validation, JUDGE_SEEDS[0])),
        validation=validation,
    )
    if processes.is_main():
        report(options, folder, before, after, accuracy, int(best.step))


def load_prompts(options: Sentiment, policy: Policy):
    """(reviews, their split, encode): `encode(rows)` makes prompts of the first tokens of these
    reviews. The split is the same for every seed; reviews that begin alike are in the same part.
    """
    reviews = sentiment.load_reviews()
    if options.tiny:
        reviews = sentiment.Reviews(reviews.texts[::40], reviews.ratings[::40])
    split = sentiment.split_by_opening(reviews.texts, policy.tokenizer.encode)
    encode = lambda rows: prompts.encode(
        [reviews.texts[i] for i in rows],
        policy.tokenizer,
        options.prompt_length,
        too_long="first",
        start=prompts.start_token(options, policy.tokenizer),
    )
    return reviews, split, encode


def make_reward(
    options: Sentiment, policy: Policy, reviews: sentiment.Reviews, split: Split, folder: Path
) -> tuple[Reward, float | None]:
    """The reward, and the classifier's accuracy on test sentences if it is the reward."""
    if options.reward == "classifier":
        return rewards.review_classifier(
            options, policy, reviews, split, folder / "reward", scale=options.reward_scale
        )
    if options.reward == "model":
        model, params = load.load_reward_model(options, policy.tokenizer)
        return Reward(in_program.reward_model(model, scale=options.reward_scale), params), None
    vader = text.vader()
    score = lambda prompt, response: options.reward_scale * vader(response)
    return Reward(on_host(score, policy.tokenizer.decode_batch)), None


def report(
    options: Sentiment,
    folder: Path,
    before: list[Judged],
    after: list[Judged],
    accuracy: float | None,
    step: int,
) -> None:
    """Write outputs.jsonl and result.json, and print them."""
    judged.write_outputs(folder, before[0], after[0])
    result = judged.compare(before, after) | {"reward_model_accuracy": accuracy, "step": step}
    kept = ("step", "validation_kl", "validation_sentiment", "validation_distinct_2")
    rows = [row for row in files.read_metrics(folder) if kept[1] in row]
    validation = [{key: row[key] for key in kept} for row in rows]
    files.write_result(
        folder, options, result, results=options.results, kind="sentiment", validation=validation
    )
    print(
        "held-out sentiment {sentiment_before:+.3f} -> {sentiment_after:+.3f} "
        "(gain {gain:+.3f} +- {gain_se:.3f}), KL {kl:.2f} +- {kl_se:.2f} nats a continuation, "
        "distinct-2 {distinct_2_ratio:.3f} of the reference's".format(**result)
    )
    names = ("result.json", "outputs.jsonl", "metrics.jsonl", "curves.png")
    print("written: " + ", ".join(str(folder / name) for name in names))


if __name__ == "__main__":
    cli.script(main, Sentiment)
