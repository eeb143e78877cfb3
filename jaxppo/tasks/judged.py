"""Continuations that a judge of text reads, before and after training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxppo.config import Config
from jaxppo.data.prompts import PromptSet
from jaxppo.rewards import text
from jaxppo.run import files, log
from jaxppo.run.policy import Policy
from jaxppo.run.sampler import Sample, Sampler
from jaxppo.types import TrainState

Judged = list[tuple[Sample, float]]  # continuations, each with its sentiment
COLUMNS = ("prompt", "before", "sentiment_before", "after", "sentiment_after", "kl")
MAX_KL = 8.0  # nats; checkpoints beyond it are not chosen


def make_judge(
    config: Config, policy: Policy, judge: Callable[[str], float], *, rows: int
) -> Callable[[TrainState, PromptSet, int], Judged]:
    """Make `read(state, prompts, seed)`, which samples continuations, `rows` at a time,
    and judges each.
    """
    sample = Sampler(config, policy, rows=rows)
    return lambda state, prompts, seed: [
        (found, judge(found.response)) for found in sample(state, prompts, seed=seed)
    ]


def summarise(judged: Judged) -> dict[str, float]:
    """Means over continuations, and the `score` that chooses a checkpoint: sentiment,
    with a penalty beyond a KL of `MAX_KL`.
    """
    kl, sentiment = mean([sample.kl for sample, _ in judged]), mean([x for _, x in judged])
    distinct = text.distinct([sample.tokens for sample, _ in judged], 2)
    score = sentiment - max(0.0, kl - MAX_KL)
    return {"sentiment": sentiment, "kl": kl, "distinct_2": distinct, "score": score}


def compare(before: list[Judged], after: list[Judged]) -> dict[str, float]:
    """Compare readings of the same prompts and seeds: sentiment, its paired gain, KL
    and distinct-2, with standard errors over continuations.
    """
    sentiments = lambda reads: [x for read in reads for _, x in read]
    gains = [y - x for x, y in zip(sentiments(before), sentiments(after), strict=True)]
    kls = [sample.kl for read in after for sample, _ in read]
    # Distinct-2 falls with the amount of text, so all are cut to the shortest.
    tokens = min(sum(len(sample.tokens) for sample, _ in read) for read in before + after)
    distinct = lambda reads: mean(
        [text.distinct([sample.tokens for sample, _ in read], 2, tokens=tokens) for read in reads]
    )
    return {
        "sentiment_before": mean(sentiments(before)),
        "sentiment_after": mean(sentiments(after)),
        "gain": mean(gains),
        "gain_se": text.standard_error(gains),
        "kl": mean(kls),
        "kl_se": text.standard_error(kls),
        "distinct_2_before": distinct(before),
        "distinct_2_after": distinct(after),
        "distinct_2_ratio": distinct(after) / distinct(before),
    }


def write_outputs(folder: Path, before: Judged, after: Judged) -> None:
    """Write outputs.jsonl, a continuation before and after a line, and print some."""
    pairs = zip(before, after, strict=True)
    cells = [(a.prompt, a.response, x, b.response, y, b.kl) for (a, x), (b, y) in pairs]
    files.write_jsonl(folder / "outputs.jsonl", [dict(zip(COLUMNS, row)) for row in cells])
    shown: list[Any] = [(a, b, f"{x:+.2f}", c, f"{y:+.2f}") for a, b, x, c, y, _ in cells[:8]]
    log.print_table("held-out prompts, continued", COLUMNS[:5], shown)


def mean(values: list[float]) -> float:
    """The mean, summed in order."""
    return sum(values) / len(values)
