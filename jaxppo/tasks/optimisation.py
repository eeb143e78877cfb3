"""Policy optimisation with a measurement before and after."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from jaxppo import algorithms, ppo, train
from jaxppo.config import RunConfig
from jaxppo.data.prompts import BatchSource, PromptSet
from jaxppo.run import load
from jaxppo.run.loop import Evaluate
from jaxppo.run.policy import Policy
from jaxppo.run.validation import add_samples
from jaxppo.tasks.rewards import Reward
from jaxppo.types import Environment, TrainState

Measured = TypeVar("Measured")


def train_and_measure(
    config: RunConfig,
    policy: Policy,
    reward: Reward,
    prompts: BatchSource,
    *,
    folder: Path,
    measure: Callable[[TrainState], Measured],
    evaluate: Evaluate,
    validation: PromptSet,
    environment: Environment | None = None,
) -> tuple[Measured, Measured, TrainState]:
    """Optimise a policy. Returns `measure` of the untrained state and of the best
    checkpoint, and that checkpoint. `eval_samples` are of the prompts `validation`.
    """
    policy.frozen["reward"] = reward.params or {}
    untrained = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(config.seed))
    before = measure(untrained)
    del untrained  # frees the optimizer's moments
    parts = algorithms.make_parts(config, reward.fn)
    parts = parts._replace(environment=environment, score_weights=reward.weights)
    evaluate = add_samples(evaluate, config, policy, parts, validation)
    state = train.fit(config, policy, parts, prompts, folder=folder, evaluate=evaluate)
    best = load.restore_best(folder, state)
    return before, measure(best), best
