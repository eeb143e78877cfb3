"""Rewards in JAX on token ids: they run inside the compiled train step.

Each function here makes a `types.RewardFn`. The parameters of a model that scores
responses come in through `frozen["reward"]`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxppo import masked, policy
from jaxppo.config import Config
from jaxppo.rewards.metrics import Text, count_ngrams, response_text
from jaxppo.types import Model, Params, RewardFn, Rollout


def count_token(token: Int | int) -> RewardFn:
    """score = how often `token` was sampled."""

    def reward(params: Params, rollout: Rollout):
        hits = (rollout.response == token) & (rollout.mask > 0)
        return hits.sum(1).astype(jnp.float32), jnp.ones(hits.shape[:1], bool)

    return reward


def no_reward(params: Params, rollout: Rollout):
    """score = 0, for a policy that learns from a teacher alone."""
    return jnp.zeros(rollout.finished.shape), jnp.ones(rollout.finished.shape, bool)


def episode_score(params: Params, rollout: Rollout):
    """score = the sum of the rewards that an environment gave to the turns; invalid if
    it is not finite.
    """
    assert rollout.rewards is not None, "no environment has answered"
    score = rollout.rewards.sum(1)
    return score, jnp.isfinite(score)


def reward_model(model: Model, *, scale: float = 1.0) -> RewardFn:
    """score = scale · value at the last token of prompt and response.

    Non-finite scores are invalid.
    """

    def reward(params: Params, rollout: Rollout):
        score = scale * policy.last_value(model, params, rollout.tokens, rollout.attend)
        return score, jnp.isfinite(score)

    return reward


def fluency(
    model: Model, config: Config, *, scale: float = 1.0, cap: float = float("inf")
) -> RewardFn:
    """score = −scale · min(log perplexity, cap) under a language model.

    The log perplexity is the mean of −log p(token | tokens before it) over the sampled
    tokens, including the end of text: nats per token at temperature 1 over the whole
    vocabulary, whatever the policy's sampling settings are. The model needs the
    policy's vocabulary. `config` sets how logits are chunked. Rows without tokens and
    rows with a non-finite perplexity are invalid.
    """
    plain = dataclasses.replace(config, temperature=1.0, top_k=0, top_p=1.0)

    def reward(params: Params, rollout: Rollout):
        logprobs = policy.response_logprobs(
            model, params, rollout, config=plain, with_values=False
        ).raw_logprobs
        cost = -masked.mean(logprobs, rollout.mask, axis=1)
        return -scale * jnp.minimum(cost, cap), jnp.isfinite(cost) & (rollout.mask.sum(1) > 0)

    return reward


def repetition(*, eos: int | tuple[int, ...], n: int = 2, scale: float = 1.0) -> RewardFn:
    """score = −scale · `repeated_share` of the response's n-grams."""

    def reward(params: Params, rollout: Rollout):
        share = repeated_share(response_text(rollout, eos=eos), n)
        return -scale * share, jnp.ones(share.shape, bool)

    return reward


def count_repeats(text: Text, n: int) -> Int[Array, "B"]:
    """Count the n-grams of each text that occur earlier in it.

    >>> text = Text(jnp.array([[1, 2, 1, 2, 1]]), jnp.array([5]))
    >>> count_repeats(text, 2).tolist()  # 12 21 12 21
    [2]
    """

    def row(tokens, length):
        equal = tokens[:, None] == tokens[None]
        starts = max(tokens.shape[0] - n + 1, 0)
        same = jnp.stack([equal[k : k + starts, k : k + starts] for k in range(n)]).all(0)
        slots = jnp.arange(starts, dtype=jnp.int32)
        return ((same & (slots[None] < slots[:, None])).any(1) & (slots <= length - n)).sum()

    return jax.vmap(row)(*text)


def repeated_share(text: Text, n: int) -> Float[Array, "B"]:
    """Return the share of n-grams that occur earlier in the text; 0 without n-grams.
    It is seq-rep-n of https://arxiv.org/abs/1908.04319.
    """
    return count_repeats(text, n) / jnp.maximum(count_ngrams(text, n), 1).astype(jnp.float32)
