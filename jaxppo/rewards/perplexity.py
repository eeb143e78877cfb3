"""Fluency as a reward in the program: how likely a language model finds the response."""

import dataclasses

import jax.numpy as jnp

from jaxppo import masked, policy
from jaxppo.config import Config
from jaxppo.types import Model, Params, RewardFn, Rollout


def reward(model: Model, config: Config, *, scale: float = 1.0, cap: float = float("inf")) -> RewardFn:
    """score = −scale · min(log perplexity, cap), with log perplexity = −mean log p(token | prompt and the tokens before it).

    The mean is over the sampled tokens, the end of text among them, in nats a token, at temperature 1 and over the whole
    vocabulary, however the policy samples. `cap` bounds what nonsense costs. The language model's whole parameters stand in
    `frozen["reward"]`; it must have the policy's vocabulary. `config` says how logits are cut into chunks. A row without a
    token, or whose perplexity is not finite, is invalid.
    """
    plain = dataclasses.replace(config, temperature=1.0, top_k=0, top_p=1.0)

    def fn(params: Params, rollout: Rollout):
        logprobs = policy.score(model, params, rollout, config=plain, with_values=False).raw_logprobs
        cost = -masked.mean(logprobs, rollout.mask, axis=1)
        return -scale * jnp.minimum(cost, cap), jnp.isfinite(cost) & (rollout.mask.sum(1) > 0)

    return fn
