"""Rewards written in JAX on token ids: part of the program, nothing leaves the
device.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxppo import masked, policy
from jaxppo.config import Config
from jaxppo.policy import last_value
from jaxppo.rewards.metrics import Text, ngrams, responses
from jaxppo.types import Model, Params, RewardFn, Rollout


def count_token(token: Int | int) -> RewardFn:
    """score = number of times `token` was sampled in the response."""

    def reward(params, rollout: Rollout):
        del params
        hits = (rollout.response == token) & (rollout.mask > 0)
        return hits.sum(1).astype(jnp.float32), jnp.ones(hits.shape[:1], bool)

    return reward


def learned(model: Model, *, scale: float = 1.0) -> RewardFn:
    """score = scale · value at the last token of prompt and response; the whole
    parameters stand in `frozen["reward"]`.
    """

    def fn(params: Params, rollout: Rollout):
        score = scale * last_value(model, params, rollout.tokens, rollout.attend)
        return score, jnp.isfinite(score)

    return fn


def fluency(
    model: Model, config: Config, *, scale: float = 1.0, cap: float = float("inf")
) -> RewardFn:
    """score = −scale · min(log perplexity, cap), with log perplexity = −mean log
    p(token | prompt and the tokens before it).

    The mean is over the sampled tokens, the end of text among them, in nats a token, at
    temperature 1 and over the whole vocabulary, however the policy samples. `cap`
    bounds what nonsense costs. The language model's whole parameters stand in
    `frozen["reward"]`; it must have the policy's vocabulary. `config` says how logits
    are cut into chunks. A row without a token, or whose perplexity is not finite, is
    invalid.
    """
    plain = dataclasses.replace(config, temperature=1.0, top_k=0, top_p=1.0)

    def fn(params: Params, rollout: Rollout):
        logprobs = policy.token_logprobs(
            model, params, rollout, config=plain, with_values=False
        ).raw_logprobs
        cost = -masked.mean(logprobs, rollout.mask, axis=1)
        return -scale * jnp.minimum(cost, cap), jnp.isfinite(cost) & (rollout.mask.sum(1) > 0)

    return fn


def repetition(*, eos: int, n: int = 2, scale: float = 1.0) -> RewardFn:
    """score = −scale · share of the response's n-grams of tokens that stand in it
    before; 0 where it has none.
    """

    def fn(params, rollout: Rollout):
        del params
        share = repeated(responses(rollout, eos=eos), n)
        return -scale * share, jnp.ones(share.shape, bool)

    return fn


def repeats(text: Text, n: int) -> Int[Array, "B"]:
    """How many n-grams of a text stand in it before: all but the first of each kind.

    >>> import jax.numpy as jnp
    >>> repeats(
    ...     Text(jnp.array([[1, 2, 1, 2, 1]]), jnp.array([5])), 2
    ... ).tolist()  # 12 21 12 21
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
    """Share of a text's n-grams that stand in it before (seq-rep-n of
    https://arxiv.org/abs/1908.04319); 0 without any.
    """
    return repeats(text, n) / jnp.maximum(ngrams(text, n), 1).astype(jnp.float32)


def distinct(text: Text, n: int) -> Float[Array, "B"]:
    """Distinct n-grams / n-grams of each text (Li et al. 2016,
    https://arxiv.org/abs/1510.03055); 0 without any.
    """
    count = ngrams(text, n)
    return (count - repeats(text, n)) / jnp.maximum(count, 1).astype(jnp.float32)
