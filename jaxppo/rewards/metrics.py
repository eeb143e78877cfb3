"""BLEU, ROUGE, word error rate and F1 of tokens, in the program: tasks that are scored
by them stay one XLA program.

Each takes a `Text` of responses and one of references, token ids from slot 0 on with
their lengths, and gives [B]. On the same tokens they are sacrebleu's, rouge-score's,
jiwer's and seqeval's numbers (`tests/rewards/test_metrics.py`). `reward` makes a
`RewardFn` of one; references stand in `extra["reference"]` (ids) and
`extra["reference_length"]`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxppo.types import RewardFn, Rollout


class Text(NamedTuple):
    """Token ids; what stands behind a text's end is never read."""

    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]


Metric = Callable[[Text, Text], Float[Array, "B"]]


def reward(metric: Metric, *, eos: int) -> RewardFn:
    """score = metric(response without its end, reference)."""

    def fn(params, rollout: Rollout):
        del params
        extra = rollout.extra
        score = metric(
            responses(rollout, eos=eos), Text(extra["reference"], extra["reference_length"])
        )
        return score, jnp.isfinite(score)

    return fn


def responses(rollout: Rollout, *, eos: int) -> Text:
    """The sampled tokens, without the end of text."""
    said = (rollout.mask > 0) & (rollout.response != eos)
    return Text(rollout.response, said.sum(1).astype(jnp.int32))


def by_row(fn: Callable) -> Metric:
    """A metric from a function of one response and one reference, (ids, length, ids,
    length) -> number.
    """
    return lambda found, wanted: jax.vmap(fn)(*found, *wanted)


def edit_distance(found: Text, wanted: Text) -> Int[Array, "B"]:
    """The fewest insertions, deletions and substitutions that make one of the other
    (Levenshtein).

    >>> import jax.numpy as jnp
    >>> text = lambda *ids: Text(jnp.array([ids]), jnp.array([len(ids)]))
    >>> edit_distance(text(1, 2, 3), text(1, 3, 4, 5)).tolist()
    [3]
    """

    def row(tokens, length, reference, reference_length):
        slots = jnp.arange(reference.shape[0] + 1, dtype=jnp.int32)

        def letter(above, number_and_token):
            number, token = number_and_token
            changed = jnp.minimum(above[1:] + 1, above[:-1] + (token != reference))
            new = jnp.concatenate([number[None] + 1, changed])
            new = jax.lax.cummin(new - slots) + slots  # an insertion costs 1 a slot
            return jnp.where(number < length, new, above), None

        numbers = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        last, _ = jax.lax.scan(letter, slots, (numbers, tokens))
        return last[reference_length]

    return by_row(row)(found, wanted)


def error_rate(found: Text, wanted: Text) -> Float[Array, "B"]:
    """Word error rate: edits / length of the reference; the number of edits where the
    reference is empty, as jiwer has it.
    """
    return edit_distance(found, wanted) / jnp.maximum(wanted.length, 1).astype(jnp.float32)


def common_subsequence(found: Text, wanted: Text) -> Int[Array, "B"]:
    """Length of the longest common subsequence."""

    def row(tokens, length, reference, reference_length):
        inside = jnp.arange(reference.shape[0], dtype=jnp.int32) < reference_length

        def letter(above, number_and_token):
            number, token = number_and_token
            hit = (token == reference) & inside & (number < length)
            new = jnp.maximum(above[1:], jnp.where(hit, above[:-1] + 1, 0))
            return jnp.concatenate([above[:1], jax.lax.cummax(new)]), None

        numbers = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        last, _ = jax.lax.scan(
            letter, jnp.zeros(reference.shape[0] + 1, jnp.int32), (numbers, tokens)
        )
        return last[-1]

    return by_row(row)(found, wanted)


def common_ngrams(found: Text, wanted: Text, n: int) -> Int[Array, "B"]:
    """n-grams of the response that the reference has too, each at most as often as it
    stands there (clipped counts).
    """

    def equal(a, b):
        hits = a[:, None] == b[None]
        rows, columns = max(a.shape[0] - n + 1, 0), max(b.shape[0] - n + 1, 0)
        shifted = jnp.stack([hits[k : k + rows, k : k + columns] for k in range(n)])
        return shifted.all(0)

    def row(tokens, length, reference, reference_length):
        places = lambda size: jnp.arange(max(size - n + 1, 0), dtype=jnp.int32)
        own, theirs = places(tokens.shape[0]), places(reference.shape[0])
        before = equal(tokens, tokens) & (own[None] < own[:, None])
        there = equal(tokens, reference) & (theirs[None] <= reference_length - n)
        return ((before.sum(1) < there.sum(1)) & (own <= length - n)).sum()

    return by_row(row)(found, wanted)


def ngrams(text: Text, n: int) -> Int[Array, "B"]:
    """How many n-grams a text has."""
    return jnp.maximum(text.length - n + 1, 0)


def f_measure(hits: Array, found: Array, wanted: Array) -> Float[Array, "B"]:
    """2 P R / (P + R) with precision P = hits / found and recall R = hits / wanted; 0
    without hits.
    """
    return 2 * hits / jnp.maximum(found + wanted, 1).astype(jnp.float32)


def bleu(found: Text, wanted: Text, *, order: int = 4) -> Float[Array, "B"]:
    """Sentence BLEU in [0, 1] (Papineni et al. 2002, https://aclanthology.org/P02-1040)
    with sacrebleu's smoothing "exp" and its effective order: n-grams longer than the
    response do not count, and the k-th order without a hit counts 1 / 2ᵏ of one.
    """
    hits = jnp.stack([common_ngrams(found, wanted, n) for n in range(1, order + 1)]).astype(
        jnp.float32
    )
    counts = jnp.stack([ngrams(found, n) for n in range(1, order + 1)]).astype(jnp.float32)
    possible = counts > 0
    missed = possible & (hits == 0)
    smoothed = jnp.where(missed, 0.5 ** jnp.cumsum(missed, 0).astype(jnp.float32), hits)
    precision = jnp.where(possible, smoothed / jnp.maximum(counts, 1), 1.0)
    mean = jnp.log(precision).sum(0) / jnp.maximum(possible.sum(0), 1)
    short = jnp.minimum(0.0, 1 - wanted.length / jnp.maximum(found.length, 1).astype(jnp.float32))
    return jnp.where(hits.sum(0) > 0, jnp.exp(mean + short), 0.0)


def rouge(found: Text, wanted: Text, *, n: int = 1) -> Float[Array, "B"]:
    """ROUGE-n, its F-measure (Lin 2004, https://aclanthology.org/W04-1013)."""
    return f_measure(common_ngrams(found, wanted, n), ngrams(found, n), ngrams(wanted, n))


def rouge_l(found: Text, wanted: Text) -> Float[Array, "B"]:
    """ROUGE-L of a sentence, its F-measure."""
    return f_measure(common_subsequence(found, wanted), found.length, wanted.length)


def token_f1(found: Text, wanted: Text) -> Float[Array, "B"]:
    """F1 of the bags of tokens, as SQuAD scores answers
    (https://arxiv.org/abs/1606.05250); two empty answers agree.
    """
    both_empty = (found.length == 0) & (wanted.length == 0)
    return jnp.where(both_empty, 1.0, rouge(found, wanted))


def exact_match(found: Text, wanted: Text) -> Float[Array, "B"]:
    """1 where response and reference are the same tokens."""
    return (edit_distance(found, wanted) == 0).astype(jnp.float32)


class Tags(NamedTuple):
    """What each tag id of a BIO scheme means, made by `tag_table`."""

    inside: Bool[Array, "K"]  # B- or I-, not O
    begins: Bool[Array, "K"]  # B-
    kind: Int[Array, "K"]  # number of the entity's type


def tag_table(names: Sequence[str]) -> Tags:
    """The table of a list of tag names such as O, B-PER, I-PER.

    >>> tag_table(["O", "B-PER", "I-PER", "B-LOC"]).kind.tolist()
    [0, 2, 2, 1]
    """
    kinds = sorted({name[2:] for name in names if name != "O"})
    inside = jnp.array([name != "O" for name in names])
    begins = jnp.array([name.startswith("B-") for name in names])
    return Tags(
        inside,
        begins,
        jnp.array([kinds.index(name[2:]) + 1 if name != "O" else 0 for name in names], jnp.int32),
    )


def entity_counts(found: Text, wanted: Text, tags: Tags) -> tuple[Array, Array, Array]:
    """(entities that both have, with type and borders; those found; those wanted), each
    Int[B], for tag ids of equal length.

    An I- after O, or after another type, begins an entity, as in conlleval and seqeval.
    """
    starts, ends, kinds = spans(found, tags)
    true_starts, true_ends, true_kinds = spans(wanted, tags)
    same = starts & true_starts & (ends == true_ends) & (kinds == true_kinds)
    return same.sum(1), starts.sum(1), true_starts.sum(1)


def entity_f1(tags: Tags) -> Metric:
    """F1 of the entities of a row of tags; 0 where neither has one."""
    return lambda found, wanted: f_measure(*entity_counts(found, wanted, tags))


def spans(
    text: Text, tags: Tags
) -> tuple[Bool[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]]:
    """(where entities begin, the last slot of the one that each slot is in, its
    type).
    """
    slots = jnp.arange(text.tokens.shape[1], dtype=jnp.int32)[None]
    within = slots < text.length[:, None]
    inside, kind = tags.inside[text.tokens] & within, jnp.where(within, tags.kind[text.tokens], 0)
    shift = lambda x, empty: jnp.pad(x, ((0, 0), (1, 0)), constant_values=empty)[:, :-1]
    starts = inside & (tags.begins[text.tokens] | (kind != shift(kind, 0)))
    after = lambda x, empty: jnp.pad(x, ((0, 0), (0, 1)), constant_values=empty)[:, 1:]
    last = inside & (~after(inside, False) | after(starts, False))
    ends = jax.lax.cummin(jnp.where(last, slots, slots.shape[1]), 1, reverse=True)
    return starts, ends, kind
