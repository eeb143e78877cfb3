"""Repetition within a response, in the program."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxppo.rewards.metrics import Text, ngrams, responses
from jaxppo.types import RewardFn, Rollout


def reward(*, eos: int, n: int = 2, scale: float = 1.0) -> RewardFn:
    """score = −scale · share of the response's n-grams of tokens that stand in it before; 0 where it has none."""

    def fn(params, rollout: Rollout):
        del params
        share = repeated(responses(rollout, eos=eos), n)
        return -scale * share, jnp.ones(share.shape, bool)

    return fn


def repeats(text: Text, n: int) -> Int[Array, "B"]:
    """How many n-grams of a text stand in it before: all but the first of each kind.

    >>> import jax.numpy as jnp
    >>> repeats(Text(jnp.array([[1, 2, 1, 2, 1]]), jnp.array([5])), 2).tolist()  # 12 21 12 21
    [2]
    """

    def row(tokens, length):
        hits = tokens[:, None] == tokens[None]
        places = max(tokens.shape[0] - n + 1, 0)
        same = jnp.stack([hits[k : k + places, k : k + places] for k in range(n)]).all(0)
        slots = jnp.arange(places, dtype=jnp.int32)
        return ((same & (slots[None] < slots[:, None])).any(1) & (slots <= length - n)).sum()

    return jax.vmap(row)(*text)


def repeated(text: Text, n: int) -> Float[Array, "B"]:
    """Share of a text's n-grams that stand in it before (seq-rep-n of https://arxiv.org/abs/1908.04319); 0 without any."""
    return repeats(text, n) / jnp.maximum(ngrams(text, n), 1).astype(jnp.float32)


def distinct(text: Text, n: int) -> Float[Array, "B"]:
    """Distinct n-grams / n-grams of each text (Li et al. 2016, https://arxiv.org/abs/1510.03055); 0 without any."""
    count = ngrams(text, n)
    return (count - repeats(text, n)) / jnp.maximum(count, 1).astype(jnp.float32)
