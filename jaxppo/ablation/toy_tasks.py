"""Toy tasks with a known optimum, on which a question is answered in seconds: a ladder,
each rung asking for one thing more.

A prompt is one symbol of seven, a response up to `response_length` of them, ended by id
0. A network of one layer is trained from nothing; the best possible reward of a rung is
1 (OPTIMA has the exception), and chance about 1/8.

    token       every symbol is 3
    prompt      every symbol is the prompt's partner
    previous    every symbol is one more than the one before
    delayed     the first symbol is the prompt's partner, and the reward comes with the last
    answer      the first symbol is the prompt's partner; for three prompts of seven it is a coin's, which cannot be learned; how
                long the response is changes nothing
    hack        a proxy of what is wanted: as many 3s as there can be are paid for, and half as many are wanted
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxppo import models
from jaxppo.config import RunConfig
from jaxppo.models.shapes import network
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run.load import Policy, put_together
from jaxppo.types import Prompts, Rollout

SYMBOLS = 7  # ids 1 to 7; 0 ends a response
RUNGS = ("token", "prompt", "previous", "delayed", "answer", "hack")
CLIMB = RUNGS[:4]  # those that can be learned whole
# numbers of `judge`
JUDGED = ("score", "gold", "right_length", "wrong_length", "excess_length")
KNOWN = 4  # of the rung "answer": prompts whose partner can be learned
OPTIMA = {name: 1.0 for name in RUNGS} | {
    "answer": (KNOWN + (SYMBOLS - KNOWN) / SYMBOLS) / SYMBOLS
}  # there 31 of 49


@dataclass(frozen=True)
class LadderConfig(RunConfig):
    """Settings with which PPO learns every rung that can be learned."""

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
    """Another symbol for each of the seven.

    >>> partner(jnp.arange(1, 8)).tolist()
    [2, 5, 1, 4, 7, 3, 6]
    """
    return (3 * (symbol - 1) + 1) % SYMBOLS + 1


def scores(rollout: Rollout) -> Float[Array, "rungs B"]:
    """The reward of each rung, in the order of RUNGS."""
    tokens, response = rollout.tokens, rollout.response
    share = lambda hits: (
        (hits & (response > 0)).astype(jnp.float32).mean(1)
    )  # of all slots: an early end earns no more
    prompt = tokens[:, -response.shape[1] - 1]
    first = response[:, 0]
    before = tokens[:, -response.shape[1] - 1 : -1]
    # a coin's symbol: it hangs on the row's whole noise, here on what was said after
    # the first symbol and on the row
    coin = (7919 * jnp.arange(len(first)) + 31 * response[:, 1:].sum(1)) % SYMBOLS + 1
    return jnp.stack(
        [
            share(response == 3),
            share(response == partner(prompt)[:, None]),
            share(response == before % SYMBOLS + 1),
            (first == partner(prompt)).astype(jnp.float32),
            (first == jnp.where(prompt <= KNOWN, partner(prompt), coin)).astype(jnp.float32),
            share(response == 3),
        ]
    )


def reward(params: Any, rollout: Rollout) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """The reward of each row's own rung, `extra["task"]`."""
    del params
    chosen = jnp.take_along_axis(scores(rollout), rollout.extra["task"][None], 0)[0]
    return chosen, jnp.ones(chosen.shape, bool)


def by_outcome(length: Float[Array, "B"], right: Bool[Array, "B"]) -> dict[str, Float[Array, ""]]:
    """For a judge: the mean length of right and of wrong responses, and by how much
    wrong ones are longer; NaN without any.
    """
    of = lambda chosen: jnp.where(
        chosen.any(), (length * chosen).sum() / jnp.maximum(chosen.sum(), 1), jnp.nan
    )
    found = {"right_length": of(right), "wrong_length": of(~right)}
    return found | {"excess_length": found["wrong_length"] - found["right_length"]}


def judge(rollout: Rollout) -> dict[str, Float[Array, ""]]:
    """Of a trained policy: `score`, its mean reward; `gold`, what the rung "hack" is a
    proxy of (1 where half of the symbols are 3s, 0 where none or all are); and how long
    the responses are that earned something, or nothing.
    """
    earned, _ = reward(None, rollout)
    threes = (rollout.response == 3).astype(jnp.float32).mean(1)
    gold = 1 - jnp.abs(2 * threes - 1)
    return {
        "score": earned.mean(),
        "gold": gold.mean(),
        **by_outcome(rollout.mask.sum(1), earned > 0),
    }


class Deal(NamedTuple):
    """Random prompts of one rung; a function of (seed, cursor) alone."""

    rung: str

    def call(self, config: RunConfig, cursor: int) -> Prompts:
        """The prompts of a dispatch, the copies of each beside each other; NumPy
        arrays.
        """
        prompts = config.rows // config.group_size
        batches = [self._batch(config, cursor + k * prompts) for k in range(config.steps_per_call)]
        return (
            batches[0]
            if config.steps_per_call == 1
            else jax.tree.map(lambda *x: np.stack(x), *batches)
        )

    def _batch(self, config: RunConfig, cursor: int) -> Prompts:
        number = RUNGS.index(self.rung)
        drawn = np.random.default_rng([config.seed, number, cursor]).integers(
            1, SYMBOLS + 1, config.rows // config.group_size
        )
        tokens: Int[np.ndarray, "B P"] = drawn.astype(np.int32).repeat(config.group_size)[:, None]
        index: Any = np.arange(config.rows, dtype=np.int32)
        mask: Any = np.ones(tokens.shape, bool)
        return Prompts(tokens, mask, index, {"task": np.full(config.rows, number, np.int32)})  # type: ignore


@cache
def tokenizer() -> Tokenizer:
    """The symbols as words.

    >>> tokenizer().decode([3, 5])
    '3 5'
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models as kinds

    words = {"<end>": 0, **{str(i): i for i in range(1, SYMBOLS + 1)}}
    return Tokenizer(Backend(kinds.WordLevel(words, unk_token="<end>")), eos_id=0, bos_id=0)


def load(config: LadderConfig) -> Policy:
    """A new network; another one for every seed."""
    shape = network(
        config.model_kind,
        vocab_size=SYMBOLS + 1,
        width=config.width,
        num_layers=config.layers,
        max_length=config.length,
    )
    weights = models.make(shape).init(jax.random.key(config.seed))
    return put_together(
        config, shape, {name: x for name, x in weights.items() if name != "value"}, tokenizer()
    )[1]
