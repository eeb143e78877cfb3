"""Toy tasks with a known optimum, on which a question is answered in seconds.

A prompt is one symbol of seven; a response is up to `response_length` of them, ended by
id 0. A network of one layer is trained from scratch. The best possible reward is 1
(OPTIMA has the exception), and chance gives about 1/8.

    token       every symbol is 3
    prompt      every symbol is the prompt's partner
    previous    every symbol is one more than the one before
    delayed     the first symbol is the prompt's partner; rewarded at the last symbol
    answer      the first symbol is the prompt's partner, but for three prompts of seven
                it is random and cannot be learned; the other symbols do not count
    hack        a proxy: every 3 is rewarded, but the true goal is that half are 3s
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Bool, Float

from jaxppo import models
from jaxppo.config import Config, RunConfig
from jaxppo.data.prompts import numpy_prompts, stack_batches
from jaxppo.models.shapes import network
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run.policy import Policy, make_policy
from jaxppo.types import Prompts, Rollout

SYMBOLS = 7  # ids 1 to 7; 0 ends a response
TASKS = ("token", "prompt", "previous", "delayed", "answer", "hack")
LEARNABLE = TASKS[:4]  # those whose best reward can be reached
JUDGE_METRICS = ("score", "best_of_8", "gold", "right_length", "wrong_length", "excess_length")
KNOWN = 4  # prompts of "answer" whose first symbol can be learned
OPTIMA = dict.fromkeys(TASKS, 1.0)
OPTIMA["answer"] = (KNOWN + (SYMBOLS - KNOWN) / SYMBOLS) / SYMBOLS  # 31 of 49


@dataclass(frozen=True)
class ToyConfig(RunConfig):
    """Settings with which PPO learns every learnable task."""

    RANGES: ClassVar = dict.fromkeys(("width", "layers"), "(0, inf)")

    width: int = 32
    """of the hidden states"""
    layers: int = 1
    batch_size: int = 64
    prompt_length: int = 1
    response_length: int = 6
    minibatches: int = 4
    steps: int = 80
    lora: int = 0
    lr: float = 3e-3
    value_coef: float = 0.5
    kl_coef: float = 0.0
    kl_adaptive: bool = False
    eos: int = 0
    pad: int = 0
    eval_every: int = 0
    save_every: int = 80


def partner(symbol: Array) -> Array:
    """The partner of each symbol: a permutation without fixed points.

    >>> partner(jnp.arange(1, 8)).tolist()
    [2, 5, 1, 4, 7, 3, 6]
    """
    return (3 * (symbol - 1) + 1) % SYMBOLS + 1


def scores(rollout: Rollout) -> Float[Array, "tasks B"]:
    """The reward of each task, in the order of TASKS."""
    tokens, response = rollout.tokens, rollout.response
    # Means over all slots, so an early end earns no more.
    share = lambda hits: (hits & (response > 0)).astype(jnp.float32).mean(1)
    prompt = tokens[:, -response.shape[1] - 1]
    first = response[:, 0]
    before = tokens[:, -response.shape[1] - 1 : -1]
    # A random symbol. It depends on the row and the response's later symbols.
    random = (7919 * jnp.arange(len(first)) + 31 * response[:, 1:].sum(1)) % SYMBOLS + 1
    return jnp.stack(
        [
            share(response == 3),
            share(response == partner(prompt)[:, None]),
            share(response == before % SYMBOLS + 1),
            (first == partner(prompt)).astype(jnp.float32),
            (first == jnp.where(prompt <= KNOWN, partner(prompt), random)).astype(jnp.float32),
            share(response == 3),
        ]
    )


def reward(params: Any, rollout: Rollout) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """The reward of each row's own task, `extra["task"]`."""
    del params
    chosen = jnp.take_along_axis(scores(rollout), rollout.extra["task"][None], 0)[0]
    return chosen, jnp.ones(chosen.shape, bool)


def length_by_outcome(
    length: Float[Array, "B"], right: Bool[Array, "B"]
) -> dict[str, Float[Array, ""]]:
    """The mean lengths of right and of wrong responses, and their difference; NaN if
    there are none.
    """
    mean = lambda chosen: jnp.where(
        chosen.any(), (length * chosen).sum() / jnp.maximum(chosen.sum(), 1), jnp.nan
    )
    found = {"right_length": mean(right), "wrong_length": mean(~right)}
    return found | {"excess_length": found["wrong_length"] - found["right_length"]}


def best_of_8(rewards: Float[Array, "B"], rollout: Rollout) -> Float[Array, ""]:
    """The mean over prompts of the best reward of eight responses: pass@8, if rewards
    are 0 or 1. NaN unless each eight rows have one prompt.
    """
    if len(rewards) % 8:
        return jnp.full((), jnp.nan)
    prompts = rollout.tokens[:, : -rollout.mask.shape[1]].reshape(len(rewards) // 8, 8, -1)
    best = rewards.reshape(-1, 8).max(1).mean()
    return jnp.where((prompts == prompts[:, :1]).all(), best, jnp.nan)


def judge(rollout: Rollout) -> dict[str, Float[Array, ""]]:
    """Metrics of a trained policy: `score`, its mean reward; `best_of_8`; `gold`, the
    true goal of "hack" (1 if half of the symbols are 3s, 0 if none or all are); and
    lengths of responses with and without a reward.
    """
    rewards, _ = reward(None, rollout)
    threes = (rollout.response == 3).astype(jnp.float32).mean(1)
    gold = 1 - jnp.abs(2 * threes - 1)
    return {
        "score": rewards.mean(),
        "best_of_8": best_of_8(rewards, rollout),
        "gold": gold.mean(),
        **length_by_outcome(rollout.mask.sum(1), rewards > 0),
    }


class RandomPrompts(NamedTuple):
    """Random prompts of one task; they depend on (seed, cursor) alone."""

    task: str

    def batches(self, config: RunConfig, cursor: int) -> Prompts:
        """The prompts of one dispatch as NumPy arrays."""
        return stack_batches(self._batch, config, cursor, config.rows // config.group_size)

    def _batch(self, config: Config, cursor: int) -> Prompts:
        number = TASKS.index(self.task)
        rng = np.random.default_rng([config.seed, number, cursor])
        drawn = rng.integers(1, SYMBOLS + 1, config.rows // config.group_size).astype(np.int32)
        tokens = drawn.repeat(config.group_size)[:, None]
        task = np.full(config.rows, number, np.int32)
        return numpy_prompts(tokens, np.ones(tokens.shape, bool), {"task": task})


@cache
def tokenizer() -> Tokenizer:
    """A tokenizer whose words are the symbols.

    >>> tokenizer().decode([3, 5])
    '3 5'
    """
    words = {"<end>": 0, **{str(i): i for i in range(1, SYMBOLS + 1)}}
    model = tokenizers.models.WordLevel(words, unk_token="<end>")
    return Tokenizer(tokenizers.Tokenizer(model), eos_id=0, bos_id=0)


def load(config: ToyConfig) -> Policy:
    """A new network over the symbols; every seed gives another one."""
    return new_policy(config, tokenizer())


def new_policy(config: ToyConfig, tokenizer: Tokenizer) -> Policy:
    """A new network over the ids of a tokenizer."""
    shape = network(
        config.model_kind,
        vocab_size=tokenizer.vocab_size,
        width=config.width,
        num_layers=config.layers,
        max_length=config.length,
    )
    params = models.make(shape).init(jax.random.key(config.seed))
    weights = {name: x for name, x in params.items() if name != "value"}
    return make_policy(config, shape, weights, tokenizer)[1]
