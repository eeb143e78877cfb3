"""Evaluate on held-out data: a supervised objective on rows, a policy on prompts."""

import math

import jax
import numpy as np

from jaxppo import supervised, types
from jaxppo.config import RunConfig
from jaxppo.data.prompts import PromptSet
from jaxppo.data.rows import Rows
from jaxppo.parallel import sharding
from jaxppo.rewards import at_k
from jaxppo.rewards.shaping import row_scores, weight_columns
from jaxppo.rollout import sample_responses
from jaxppo.run.loop import Evaluate
from jaxppo.run.policy import Policy
from jaxppo.run.sampler import decode_rollout, on_batches
from jaxppo.supervised import Objective
from jaxppo.types import Parts, TrainState

SEED = 1001  # of the samples in every evaluation
ROWS = 64  # prompts at a time


def make_validation(
    config: RunConfig, policy: Policy, objective: Objective, rows: Rows
) -> Evaluate:
    """Make `evaluate(state)` for `train.fit`: the objective's metrics, averaged over
    all rows.

    `score` is the accuracy if there is one; otherwise it is minus the loss, and there
    is a `perplexity`, exp(loss).
    """
    program = jax.jit(supervised.make_evaluation(policy.model, objective))
    size = max(config.batch_size // rows.unit, 1)

    def evaluate(state: TrainState) -> dict[str, float]:
        sums: dict[str, float] = {}
        total = 0.0
        for start in range(0, len(rows), size):
            part = rows.take(np.arange(start, min(start + size, len(rows))))
            with sharding.rows_on_mesh(state.params, part.all()) as batch:
                found, weight = program(state.params, state.frozen, batch)
            total += float(weight)
            sums = {name: sums.get(name, 0.0) + float(x) for name, x in found.items()}
        means = {name: x / total for name, x in sums.items()}
        if "accuracy" in means:
            return {**means, "score": means["accuracy"]}
        return {**means, "perplexity": math.exp(min(means["loss"], 80.0)), "score": -means["loss"]}

    return evaluate


def make_reward_validation(
    config: RunConfig, policy: Policy, parts: Parts, prompts: PromptSet
) -> Evaluate:
    """Make `evaluate(state)` for `train.fit`: means over the responses to held-out
    prompts, with the same noise each time. `score` is the reward.

    With `eval_samples` k > 1 these are means over k responses to each prompt, and there
    are avg@k, maj@k and pass@k (`rewards.at_k`). Prompts with an invalid reward among
    their k count in none of those.
    """
    total, k = len(prompts.tokens), config.eval_samples
    parts = types.checked(parts)

    def program(params, frozen, batch, key):
        rolled = sample_responses(
            config,
            policy.model,
            params,
            frozen,
            batch,
            key,
            group_size=k,
            environment=parts.environment,
        )
        raw, valid = parts.reward(frozen["reward"], rolled)
        kl = ((rolled.raw_logprobs - rolled.ref_logprobs) * rolled.mask).sum(1)
        found = {"reward": row_scores(weight_columns(raw, parts.score_weights)), "kl": kl}
        names = enumerate(name for name, _ in parts.score_weights)
        found |= {f"score_{name}": raw[:, column] for column, name in names}
        found["length"] = rolled.mask.sum(1)
        return (found, valid), rolled if k > 1 else None

    compiled = jax.jit(program)

    def evaluate(state: TrainState) -> dict[str, float]:
        parts_found, texts = [], []
        batches = prompts.in_order(k * max(min(ROWS // k, total), 1), copies=k)
        for found, rolled in on_batches(compiled, state, batches, seed=SEED):
            parts_found.append(found)
            texts += decode_rollout(policy.tokenizer, rolled)[1] if rolled else []
        values, valid = jax.tree.map(lambda *x: np.concatenate(x)[: k * total], *parts_found)
        means = {name: float(x[valid].mean()) for name, x in values.items() if valid.any()}
        means["score"] = means.get("reward", -math.inf)
        whole = valid.reshape(-1, k).all(1)
        if k > 1 and whole.any():
            each = [texts[k * row : k * (row + 1)] for row in np.flatnonzero(whole)]
            scores = values["reward"].reshape(-1, k)[whole]
            means |= at_k.summarise(scores, each, least=config.eval_right)
        return means

    return evaluate


def add_samples(
    evaluate: Evaluate, config: RunConfig, policy: Policy, parts: Parts, prompts: PromptSet
) -> Evaluate:
    """Add avg@k, maj@k and pass@k of `make_reward_validation` to another evaluation, if
    `eval_samples` asks for them.
    """
    if config.eval_samples == 1:
        return evaluate
    sampled = make_reward_validation(config, policy, parts, prompts)
    at = lambda state: {name: x for name, x in sampled(state).items() if "@" in name}
    return lambda state: evaluate(state) | at(state)
