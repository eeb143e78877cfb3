"""Episodes of a run's policy: an environment on the tokens of its vocabulary, the
instances that it needs, and what was played as text.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxppo import sampling
from jaxppo.config import Config, RunConfig
from jaxppo.data import table
from jaxppo.data.prompts import PromptSet, start_token
from jaxppo.environments import text
from jaxppo.environments.play import Episode
from jaxppo.environments.text import Game, Tables, TextEnvironment
from jaxppo.errors import UserError
from jaxppo.rollout import sample_responses
from jaxppo.run.policy import Policy
from jaxppo.run.sampler import on_batches
from jaxppo.types import Environment, Rollout, TrainState

World = Environment | TextEnvironment | Game
ROWS = 256  # episodes at a time


def tables_of(policy: Policy) -> Tables:
    """What the policy's tokens write, and the token of each byte."""
    return text.make_tables(policy.tokenizer, vocab_size=policy.shape.vocab_size)


def on_tokens(world: World, policy: Policy) -> Environment:
    """The environment on the policy's tokens."""
    world = world.environment if isinstance(world, Game) else world
    return world if isinstance(world, Environment) else text.on_bytes(world, tables_of(policy))


def response_length(world: World) -> int:
    """The slots of an episode on any tokens: a byte of a text environment is one."""
    world = world.environment if isinstance(world, Game) else world
    if isinstance(world, Environment):
        return world.length
    return world.max_turns * (world.turn_length + world.reply_length)


def instances(columns: Mapping[str, Sequence[Any]], world: World) -> dict[str, np.ndarray]:
    """The columns of numbers and arrays [N ...], which `reset` takes by name. Raises
    UserError if it takes another one.
    """
    found, problems = table.read_numbers(columns)
    reset = world.environment.reset if isinstance(world, Game) else world.reset
    row = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in found.items()}
    keys = lambda: sampling.world_keys(jax.random.key(0), jnp.zeros(1, jnp.int32))
    try:
        jax.eval_shape(lambda instance: reset(instance, keys()), row)
    except KeyError as error:
        (name, *_) = error.args or ("",)
        if not isinstance(name, str) or name in found:
            raise  # of its own
        known = ", ".join(found) or "none"
        why = problems.get(name, f"is none of the prompts; columns of numbers: {known}")
        raise UserError(f"the environment starts from the column {name!r}, which {why}") from None
    return found


def encode(
    config: RunConfig, policy: Policy, columns: Mapping[str, Sequence[Any]], world: World
) -> PromptSet:
    """Prompts of at most the run's length, with what the environment starts from."""
    extra = instances(columns, world)
    options = {"too_long": "last", "start": start_token(config, policy.tokenizer)}
    length = config.prompt_length
    return table.encode_columns(columns, policy.tokenizer, length, extra=extra, **options)


def rollouts(
    config: Config,
    policy: Policy,
    environment: Environment,
    state: TrainState,
    prompts: PromptSet,
    *,
    seed: int,
    greedy: bool = False,
) -> Iterator[Rollout]:
    """An episode on each prompt, some at a time, on the host; the last prompt fills up
    the last ones.
    """

    def program(params, frozen, batch, key):
        options = {"greedy": greedy, "environment": environment}
        return sample_responses(config, policy.model, params, frozen, batch, key, **options)

    batches = prompts.in_order(min(ROWS, len(prompts.tokens)))
    return on_batches(jax.jit(program), state, batches, seed=seed)


def play(
    config: Config,
    policy: Policy,
    environment: Environment,
    state: TrainState,
    prompts: PromptSet,
    *,
    seed: int,
    greedy: bool = False,
) -> list[Episode]:
    """What the policy plays on each prompt, as text."""
    parts = rollouts(config, policy, environment, state, prompts, seed=seed, greedy=greedy)
    decode = policy.tokenizer.decode_batch
    found = [x for part in parts for x in as_texts(part, environment, decode)]
    return found[: len(prompts.tokens)]


def as_texts(done: Rollout, environment: Environment, decode) -> list[Episode]:
    """The episodes of a rollout on the host; a row's turns end where it wrote nothing
    more.
    """
    length, prompt_length = done.mask.shape[1], done.tokens.shape[1] - done.mask.shape[1]
    size = environment.turn_length + environment.observation_length
    own, read = done.mask > 0, done.attend[:, prompt_length:]
    rewards, found = np.asarray(done.rewards), []
    for row, tokens in enumerate(done.tokens):
        answers = read[row] & ~own[row]
        starts = [t for t in range(0, length, size) if own[row, t]]
        texts = [tokens[:prompt_length][done.attend[row, :prompt_length]]]
        for mask in (own[row], answers):
            response = tokens[prompt_length:]
            texts += [response[t : t + size][mask[t : t + size]] for t in starts]
        prompt, *said = decode([x.tolist() for x in texts])
        scores = [float(rewards[row, t : t + size].sum()) for t in starts]
        turns, replies = said[: len(starts)], said[len(starts) :]
        found.append(Episode({"prompt": prompt}, turns, replies, scores, bool(done.finished[row])))
    return found
