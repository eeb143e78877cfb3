"""Time episodes whose environment runs inside the program, and in a loop on the host.

Question   What does it save that a whole episode, the environment included, is one program?
Work       64 rows of a game on bytes, written by a random network: all turns have their full
           length, unless an end of text is drawn.
             tiny  GPT-2 shape, 2 layers, width 64: that of `experiments/episodes.py`
             S     GPT-2 shape, 4 layers, width 256
Command    python experiments/benchmarks/episodes.py
           python experiments/benchmarks/episodes.py --size tiny --environment calculator
Minutes    3 for S (2 CPU cores). The machine must be quiet.
Columns    program: one dispatch: prompts are read, every turn is decoded, answered and read.
           host: the same functions, compiled as one program a turn, which reads the answer to the
           last turn and decodes the next; the cache stays on the device. The turns' tokens go to
           the host, which calls the environment's jitted step, and its answer goes back. Between
           two turns: the environment's part of it.
           several seeds: as many networks in one program by vmap; on the host one after the other.
           Neither has the reference's log-probs, rewards or the update.

All are run in turns, and play the same episodes.
"""

import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
import own_step

from jaxppo import algorithms, cli, models, sampling
from jaxppo.config import Config
from jaxppo.data import prompts
from jaxppo.decoding import loop, turns
from jaxppo.decoding.turns import Episode
from jaxppo.environments import ENVIRONMENTS, text
from jaxppo.models import shapes
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.types import Observation, Params, PyTree, Turn

GAMES = {"guess": {"n": 100, "guesses": 6}}  # options; the others have their own defaults
SIZES = {
    "smoke": {"width": 16, "num_layers": 1, "num_heads": 2},
    "tiny": {"width": 64, "num_layers": 2, "num_heads": 4},
    "S": {"width": 256, "num_layers": 4, "num_heads": 4},
}
LEAST_ALIKE = 0.9  # of the episodes
CONTENTS = {
    "program": "one dispatch for all turns, answers included",
    "host": "one dispatch a turn; the environment's jitted step, called between two",
    "program_seeds": "the same program for all seeds at once",
    "host_seeds": "the host's loop for one seed after the other",
}


@dataclass(frozen=True)
class Options:
    RANGES: ClassVar = dict.fromkeys(("rows", "seeds", "steps"), "(0, inf)")

    size: Literal["S", "tiny", "smoke"] = "S"
    """shape of the network; smoke is a test"""
    environment: str = "guess"
    """name of an environment (`jaxppo.environments.ENVIRONMENTS`)"""
    rows: int = 64
    seeds: int = 4
    """networks in one program, in the second comparison"""
    steps: int = 9
    """rounds timed, after one of warm-up"""
    json: bool = False
    """print the numbers as one line of JSON, the last"""


class Played(NamedTuple):
    """What a batch of episodes has come to."""

    tokens: Any  # Int[B T], answers included
    mask: Any  # Bool[B T], tokens that the policy wrote
    score: Any  # Float[B]


class Subject:
    """A network, a game, and both ways to play it."""

    def __init__(self, options: Options):
        tokenizer = byte_tokenizer()
        make = algorithms.look_up(ENVIRONMENTS, "environment", options.environment)
        game = make(**GAMES.get(options.environment, {}))
        tables = text.make_tables(tokenizer)
        self.world = text.on_bytes(game.environment, tables)
        instances = game.instances(options.rows, 0)
        texts = [x["prompt"] for x in instances]
        width = max(len(x.encode()) for x in texts)
        self.config = Config(
            batch_size=options.rows,
            prompt_length=width,
            response_length=self.world.length,
            lora=0,
            eos=tokenizer.eos_id,
        )
        given = prompts.encode(
            texts, tokenizer, width, extra=text.stack(instances), too_long="error"
        )
        (self.prompts,) = map(jax.device_put, given.in_order(options.rows))
        shape = shapes.gpt2(
            vocab_size=tokenizer.vocab_size, max_length=self.config.length, **SIZES[options.size]
        )
        self.model = models.make(shape)
        init = jax.jit(jax.vmap(self.model.init))
        self.params = init(jax.random.split(jax.random.key(0), options.seeds))
        pick = lambda i: jax.tree.map(lambda x: x[i], self.params)
        self.networks = [pick(i) for i in range(options.seeds)]
        self.one = jax.jit(self.play)
        self.many = jax.jit(jax.vmap(partial(self.play, stop_axis="seeds"), axis_name="seeds"))
        self.first, self.next = jax.jit(self.first_turn), jax.jit(self.next_turn, donate_argnums=1)
        self.reset, self.step = jax.jit(self.new_world), jax.jit(self.world.step)
        self.between: list[float] = []  # seconds between the turns of a batch

    def decoder(self, params: Params, stop_axis: str | None = None) -> loop.Decoder:
        c = self.config
        fixed = {"with_values": False, "greedy": False, "stops": None, "stop_axis": stop_axis}
        return loop.Decoder(self.model, params, c, c.response_length, c.eos, c.pad, **fixed)

    def new_world(self, key: jax.Array) -> PyTree:
        keys = sampling.world_keys(key, self.prompts.index)
        return self.world.reset(self.prompts.extra, keys)

    def start(self, decoder: loop.Decoder, key: jax.Array, world: PyTree) -> Episode:
        """The prompts are read."""
        noise = sampling.row_uniforms(key, self.prompts.index, self.config.response_length)
        state, hidden = loop.prefill(decoder, self.prompts, noise, group_size=1)
        return turns.first_episode(world, state, hidden)

    def play(self, params: Params, key: jax.Array, stop_axis: str | None = None) -> Played:
        """Whole episodes."""
        decoder = self.decoder(params, stop_axis)
        done = turns.play(decoder, self.world, self.start(decoder, key, self.new_world(key)))
        return Played(done.tokens, done.mask, done.rewards.sum(1))

    def first_turn(self, params: Params, key: jax.Array) -> tuple[Episode, Turn]:
        decoder = self.decoder(params)
        return turns.take_turn(decoder, self.world, self.start(decoder, key, None))

    def next_turn(
        self, params: Params, episode: Episode, turn: Turn, seen: Observation
    ) -> tuple[Episode, Turn]:
        decoder = self.decoder(params)
        return turns.take_turn(
            decoder, self.world, turns.read_answer(decoder, self.world, episode, turn, seen)
        )

    def on_host(self, params: Params, key: jax.Array) -> Played:
        """The same, turn by turn."""
        world, spent = self.reset(key), 0.0
        done, score = np.zeros(self.config.batch_size, bool), np.zeros(self.config.batch_size)
        episode, turn = self.first(params, key)
        for number in range(self.world.max_turns):
            turn = jax.block_until_ready(turn)
            begin = time.perf_counter()
            world, seen = self.step(world, jax.device_get(turn))
            ended, reward = jax.device_get((seen.done, seen.reward))
            score += np.where(done, 0.0, reward)
            done |= ended
            spent += time.perf_counter() - begin
            if done.all() or number + 1 == self.world.max_turns:
                break
            episode, turn = self.next(params, episode, turn, seen)
        self.between.append(spent)
        return Played(episode.decoding.tokens, episode.decoding.mask, score)

    def seeds_on_host(self, keys: list[jax.Array]) -> list[Played]:
        """Networks one after the other."""
        return [self.on_host(x, key) for x, key in zip(self.networks, keys, strict=True)]


def main(options: Options) -> None:
    subject = Subject(options)
    clocks = {name: own_step.Clock() for name in ("program", "host", "program_seeds", "host_seeds")}
    same, length = [], []
    for number in range(options.steps + 1):
        keys = jax.random.split(jax.random.key(number + 1), options.seeds)
        each = jax.block_until_ready(list(keys))
        one = clocks["program"](subject.one, subject.networks[0], each[0])
        other = clocks["host"](subject.on_host, subject.networks[0], each[0])
        many = clocks["program_seeds"](subject.many, subject.params, keys)
        others = clocks["host_seeds"](subject.seeds_on_host, each)
        same.append(share_alike(one, other))
        same.append(share_alike(many, jax.tree.map(lambda *x: np.stack(x), *others)))
        length.append(np.asarray(many.mask).sum(-1).mean())
    if min(same) < LEAST_ALIKE:
        raise SystemExit(f"other episodes: {min(same):.0%} of the rows are the same")
    found = measured(options, subject, clocks) | {
        "same_episodes": float(np.mean(same)),
        "length": float(np.mean(length)),
    }
    show(found)
    if options.json:
        print(json.dumps(found))


def share_alike(one: Played, other: Played) -> float:
    """The share of episodes with the same tokens and score. Rounding differs between programs, and
    so may a token between whose bounds the noise falls.
    """
    tokens = (np.asarray(one.tokens) == np.asarray(other.tokens)).all(-1)
    return float((tokens & (np.asarray(one.score) == np.asarray(other.score))).mean())


def measured(
    options: Options, subject: Subject, clocks: Mapping[str, own_step.Clock]
) -> dict[str, Any]:
    """Median seconds, and episodes a second."""
    seconds = {name: statistics.median(clock.wall[1:]) for name, clock in clocks.items()}
    rows = dict.fromkeys(("program", "host"), options.rows)
    rows |= dict.fromkeys(("program_seeds", "host_seeds"), options.rows * options.seeds)
    world = subject.world
    return {
        "size": options.size,
        "environment": options.environment,
        "rows": options.rows,
        "seeds": options.seeds,
        "turns": world.max_turns,
        "turn_length": world.turn_length,
        "answer_length": world.observation_length,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        **{f"{name}_s": x for name, x in seconds.items()},
        **{f"{name}_episodes_per_s": rows[name] / x for name, x in seconds.items()},
        "between_turns_s": statistics.median(subject.between),
        "ratio": seconds["host"] / seconds["program"],
        "ratio_seeds": seconds["host_seeds"] / seconds["program_seeds"],
    }


def show(found: Mapping[str, Any]) -> None:
    print(
        f"{found['size']}, {found['environment']}: {found['rows']} episodes of up to "
        f"{found['turns']} turns of {found['turn_length']} tokens, answers of up to "
        f"{found['answer_length']}; {found['length']:.1f} tokens written an episode; "
        f"{found['same_episodes']:.2%} are the same"
    )
    for name, what in CONTENTS.items():
        rate = found[f"{name}_episodes_per_s"]
        print(f"{name:13} {found[f'{name}_s']:.4f} s, {rate:,.0f} episodes/s: {what}")
    print(
        f"host / program {found['ratio']:.2f}, {found['seeds']} seeds {found['ratio_seeds']:.2f}; "
        f"between the turns of a batch on the host {found['between_turns_s']:.4f} s"
    )


if __name__ == "__main__":
    cli.script(main, Options)
