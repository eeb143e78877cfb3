"""Toy tasks of several turns: small games of `environments` with known optima.

The network is that of `toy_tasks`, on a vocabulary of the bytes that the game needs and
the end of text; it can read all of them, and write those of its turns. A turn has at
most two tokens: a symbol, and a newline or the end of text. Others are wasted.

    bandit_with_memory  four arms, three pulls; each pull has a reward, and only the
                        symbol counts
    guess               a number from 1 to 7 in three guesses; 1 if it is found
    maze                3 × 3 squares, four moves; the goal is worth D / M
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from jaxppo import algorithms
from jaxppo.ablation import toy_tasks
from jaxppo.data import prompts
from jaxppo.data.prompts import PromptSet
from jaxppo.environments import bandit_with_memory, guess, maze, text
from jaxppo.environments.text import Game
from jaxppo.models import missing
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run.policy import Policy
from jaxppo.types import Environment, Parts, RewardFn

TURN = 2  # tokens
INSTANCES = 1024


@dataclass(frozen=True)
class GameConfig(toy_tasks.ToyConfig):
    """Settings with which PPO learns the games."""

    game: str = ""
    """one of `GAMES`"""
    steps: int = 160
    save_every: int = 160


class Toy(NamedTuple):
    """A game, the bytes of the policy's turns, and what else prompts have."""

    game: Game
    turns: bytes
    prompt: bytes = b""


GAMES = {
    "bandit_with_memory": Toy(bandit_with_memory.make(arms=4, turns=3), b"abcd\n"),
    "guess": Toy(guess.make(n=7, guesses=3), b"1234567\n", b"-"),
    "maze": Toy(maze.make(size=3, moves=4), b"nesw\n"),
}


@cache
def tokenizer(name: str) -> Tokenizer:
    """A tokenizer of the bytes of a game.

    >>> tokenizer("bandit_with_memory").vocab_size  # abcd.\\n and the end of text
    7
    """
    toy = GAMES[name]
    return byte_tokenizer(toy.game.environment.alphabet + toy.turns + toy.prompt)


@cache
def environment(name: str) -> Environment:
    """A game on the tokens of its vocabulary."""
    tables = text.make_tables(tokenizer(name))
    return text.on_bytes(GAMES[name].game.environment, tables, turn_length=TURN)


@cache
def instances(name: str) -> PromptSet:
    """The prompts of a game."""
    drawn = GAMES[name].game.instances(INSTANCES, 0)
    texts, extra = [x["prompt"] for x in drawn], text.stack(drawn)
    length = max(map(len, texts))
    return prompts.encode(texts, tokenizer(name), length, extra=extra, too_long="error")


def settings(name: str) -> dict[str, Any]:
    """What a game asks for: its lengths and the ids of its vocabulary."""
    return {
        "game": name,
        "prompt_length": instances(name).tokens.shape[1],
        "response_length": environment(name).length,
        "eos": tokenizer(name).eos_id,
        "pad": tokenizer(name).pad_id,
    }


def load(config: GameConfig) -> Policy:
    """A new network for a game; every seed gives another one."""
    known = tokenizer(config.game)
    policy = toy_tasks.new_policy(config, known)
    own = [known.eos_id, *known.encode(GAMES[config.game].turns.decode())]
    barred = np.setdiff1d(np.arange(known.vocab_size), own)
    return replace(policy, model=missing.without(policy.model, barred))


def make_parts(config: GameConfig, reward: RewardFn) -> Parts:
    """The parts that the settings name, and the game."""
    return algorithms.make_parts(config, reward)._replace(environment=environment(config.game))
