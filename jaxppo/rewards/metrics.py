"""BLEU, ROUGE, word error rate and F1 on token ids, inside the compiled program.

A metric takes a `Text` of responses and one of references and returns [B]. On the same
tokens it equals sacrebleu, rouge-score or jiwer. `as_reward` turns a metric
into a `RewardFn`; the references are `extra["reference"]` (ids) and
`extra["reference_length"]`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxppo.sampling import is_eos
from jaxppo.types import Params, RewardFn, Rollout


class Text(NamedTuple):
    """Token ids from slot 0 on; slots beyond the length are never read."""

    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]


Metric = Callable[[Text, Text], Float[Array, "B"]]


def as_reward(metric: Metric, *, eos: int | tuple[int, ...]) -> RewardFn:
    """score = metric(response without its end of text, reference)."""

    def reward(params: Params, rollout: Rollout):
        reference = Text(rollout.extra["reference"], rollout.extra["reference_length"])
        score = metric(response_text(rollout, eos=eos), reference)
        return score, jnp.isfinite(score)

    return reward


def response_text(rollout: Rollout, *, eos: int | tuple[int, ...]) -> Text:
    """Return the sampled tokens without the end of text."""
    kept = (rollout.mask > 0) & ~is_eos(rollout.response, eos)
    return Text(rollout.response, kept.sum(1).astype(jnp.int32))


def edit_distance(response: Text, reference: Text) -> Int[Array, "B"]:
    """Return the fewest insertions, deletions and substitutions (Levenshtein).

    >>> text = lambda *ids: Text(jnp.array([ids]), jnp.array([len(ids)]))
    >>> edit_distance(text(1, 2, 3), text(1, 3, 4, 5)).tolist()
    [3]
    """

    def row(tokens, length, wanted, wanted_length):
        slots = jnp.arange(wanted.shape[0] + 1, dtype=jnp.int32)

        def step(above, number_and_token):
            number, token = number_and_token
            changed = jnp.minimum(above[1:] + 1, above[:-1] + (token != wanted))
            new = jnp.concatenate([number[None] + 1, changed])
            new = jax.lax.cummin(new - slots) + slots  # an insertion costs 1 per slot
            return jnp.where(number < length, new, above), None

        numbers = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        last, _ = jax.lax.scan(step, slots, (numbers, tokens))
        return last[wanted_length]

    return jax.vmap(row)(*response, *reference)


def error_rate(response: Text, reference: Text) -> Float[Array, "B"]:
    """Return edits / length of the reference (WER); the number of edits where the
    reference is empty, like jiwer.
    """
    edits = edit_distance(response, reference)
    return edits / jnp.maximum(reference.length, 1).astype(jnp.float32)


def common_subsequence(response: Text, reference: Text) -> Int[Array, "B"]:
    """Return the length of the longest common subsequence."""

    def row(tokens, length, wanted, wanted_length):
        inside = jnp.arange(wanted.shape[0], dtype=jnp.int32) < wanted_length

        def step(above, number_and_token):
            number, token = number_and_token
            hit = (token == wanted) & inside & (number < length)
            new = jnp.maximum(above[1:], jnp.where(hit, above[:-1] + 1, 0))
            return jnp.concatenate([above[:1], jax.lax.cummax(new)]), None

        numbers = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        start = jnp.zeros(wanted.shape[0] + 1, jnp.int32)
        return jax.lax.scan(step, start, (numbers, tokens))[0][-1]

    return jax.vmap(row)(*response, *reference)


def common_ngrams(response: Text, reference: Text, n: int) -> Int[Array, "B"]:
    """Count the response's n-grams that are in the reference, each at most as often as
    it occurs there (clipped counts).
    """

    def equal(a, b):
        hits = a[:, None] == b[None]
        rows, columns = max(a.shape[0] - n + 1, 0), max(b.shape[0] - n + 1, 0)
        return jnp.stack([hits[k : k + rows, k : k + columns] for k in range(n)]).all(0)

    def row(tokens, length, wanted, wanted_length):
        starts = lambda size: jnp.arange(max(size - n + 1, 0), dtype=jnp.int32)
        own, other = starts(tokens.shape[0]), starts(wanted.shape[0])
        before = equal(tokens, tokens) & (own[None] < own[:, None])
        there = equal(tokens, wanted) & (other[None] <= wanted_length - n)
        return ((before.sum(1) < there.sum(1)) & (own <= length - n)).sum()

    return jax.vmap(row)(*response, *reference)


def count_ngrams(text: Text, n: int) -> Int[Array, "B"]:
    """Count the n-grams of each text."""
    return jnp.maximum(text.length - n + 1, 0)


def f_measure(hits: Array, found: Array, wanted: Array) -> Float[Array, "B"]:
    """Return 2 P R / (P + R) with P = hits / found and R = hits / wanted; 0 without
    hits.
    """
    return 2 * hits / jnp.maximum(found + wanted, 1).astype(jnp.float32)


def bleu(response: Text, reference: Text, *, order: int = 4) -> Float[Array, "B"]:
    """Return sentence BLEU in [0, 1] (Papineni et al. 2002,
    https://aclanthology.org/P02-1040), with sacrebleu's smoothing "exp" and effective
    order: n-grams longer than the response do not count, and the k-th order without a
    hit counts as 1 / 2ᵏ of a hit.
    """
    orders = range(1, order + 1)
    hits = jnp.stack([common_ngrams(response, reference, n) for n in orders]).astype(jnp.float32)
    counts = jnp.stack([count_ngrams(response, n) for n in orders]).astype(jnp.float32)
    possible = counts > 0
    missed = possible & (hits == 0)
    smoothed = jnp.where(missed, 0.5 ** jnp.cumsum(missed, 0).astype(jnp.float32), hits)
    precision = jnp.where(possible, smoothed / jnp.maximum(counts, 1), 1.0)
    mean = jnp.log(precision).sum(0) / jnp.maximum(possible.sum(0), 1)
    ratio = reference.length / jnp.maximum(response.length, 1).astype(jnp.float32)
    brevity = jnp.minimum(0.0, 1 - ratio)
    return jnp.where(hits.sum(0) > 0, jnp.exp(mean + brevity), 0.0)


def rouge(response: Text, reference: Text, *, n: int = 1) -> Float[Array, "B"]:
    """Return the F-measure of ROUGE-n (Lin 2004, https://aclanthology.org/W04-1013)."""
    hits = common_ngrams(response, reference, n)
    return f_measure(hits, count_ngrams(response, n), count_ngrams(reference, n))


def rouge_l(response: Text, reference: Text) -> Float[Array, "B"]:
    """Return the F-measure of ROUGE-L."""
    return f_measure(common_subsequence(response, reference), response.length, reference.length)


def token_f1(response: Text, reference: Text) -> Float[Array, "B"]:
    """Return the F1 of the bags of tokens, like SQuAD (https://arxiv.org/abs/1606.05250);
    1 if both are empty.
    """
    both_empty = (response.length == 0) & (reference.length == 0)
    return jnp.where(both_empty, 1.0, rouge(response, reference))


def exact_match(response: Text, reference: Text) -> Float[Array, "B"]:
    """Return 1 where response and reference are the same tokens, else 0."""
    return (edit_distance(response, reference) == 0).astype(jnp.float32)
