"""Episodes of several turns: the policy writes, the environment answers, the policy
reads the answer.

All rows write up to M tokens, then the environment answers each with up to O, and so
on, in lock-step. Turn k begins in slot k (M + O) of the response, and the answer to it
ends where the next begins.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxppo.config import Config
from jaxppo.decoding.loop import Decoder, Decoding
from jaxppo.errors import UserError
from jaxppo.types import Environment, Observation, Prompts, PyTree, Turn


class Episode(struct.PyTreeNode):
    """State of the loop over turns."""

    turn: Int[Array, ""]
    world: PyTree  # the environment's state
    decoding: Decoding
    hidden: Float[Array, "B D"]  # chooses the first token of the turn
    finished: Bool[Array, "B"]  # the environment ended the episode
    done: Bool[Array, "B"]  # finished, or the answer was not valid


def check_environment(
    environment: Environment, sample: Config, length: int, prompts: Prompts
) -> None:
    """Check that episodes fit the response length, and the settings episodes. Raises
    UserError.
    """
    if environment.length != length:
        raise UserError(
            f"{environment.max_turns} turns of {environment.turn_length} tokens, each with an "
            f"answer of {environment.observation_length}, need --response-length "
            f"{environment.length}, but it is {length}"
        )
    if sample.min_tokens:
        raise UserError("--min-tokens counts a response's tokens; with an environment, leave it 0")
    if "max_tokens" in prompts.extra:
        raise UserError('extra["max_tokens"] limits a response of one turn, not an episode')


def first_episode(world: PyTree, state: Decoding, hidden: Float[Array, "B D"]) -> Episode:
    """The state before the first turn."""
    nothing = jnp.zeros(state.tokens.shape, bool)
    state = state.replace(read=nothing, rewards=nothing.astype(jnp.float32))
    nobody = nothing[:, 0]
    return Episode(jnp.zeros((), jnp.int32), world, state, hidden, nobody, nobody)


def play(decoder: Decoder, environment: Environment, start: Episode) -> Decoding:
    """Decode turn after turn until all episodes have ended."""

    def one(episode: Episode) -> Episode:
        episode, turn = take_turn(decoder, environment, episode)
        with jax.named_scope("environment"):
            world, seen = environment.step(episode.world, turn)
        return read_answer(decoder, environment, episode.replace(world=world), turn, seen)

    more = lambda episode: _goes_on(decoder, environment, episode.turn, episode.done)
    played = jax.lax.while_loop(more, one, start)
    return played.decoding.replace(finished=played.finished)


def take_turn(decoder: Decoder, environment: Environment, episode: Episode) -> tuple[Episode, Turn]:
    """Decode the next turn of all rows that have not ended."""
    begin, end = _slots(environment, episode)
    state = episode.decoding
    state = state.replace(
        t=begin,
        finished=episode.done,
        done=episode.done,
        limit=jnp.broadcast_to(end, episode.done.shape),
        stop_state=None if state.stop_state is None else jnp.zeros_like(state.stop_state),
    )
    with jax.named_scope("decode"):
        state = decoder.choose(state, episode.hidden)
        state = jax.lax.while_loop(decoder.running, decoder.step, state)
    cut = lambda x: jax.lax.dynamic_slice(x, (0, begin), (len(x), environment.turn_length))
    turn = Turn(cut(state.tokens), cut(state.mask).sum(1, dtype=jnp.int32))
    return episode.replace(decoding=state), turn


def read_answer(
    decoder: Decoder, environment: Environment, episode: Episode, turn: Turn, seen: Observation
) -> Episode:
    """Read what the environment answered to the turn.

    An answer of no token or of more than O, or a reward that is not finite, ends the
    episode of its row with the reward NaN, so that the row is invalid. What the
    environment says of a row after its end is ignored.
    """
    begin, end = _slots(environment, episode)
    state, valid = episode.decoding, is_valid(seen, environment)
    assert state.rewards is not None and state.read is not None  # `first_episode` made them
    reward = jnp.where(valid, seen.reward, jnp.nan)
    slots = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)[None]
    last = (slots == (begin + turn.length - 1)[:, None]) & ~episode.done[:, None]
    done = episode.done | seen.done | ~valid
    more = _goes_on(decoder, environment, episode.turn + 1, done)
    tokens, answered = _answers(seen, ~done & more, pad=decoder.pad)
    write = lambda x, new: jax.lax.dynamic_update_slice(x, new, (0, end))

    def read(state: Decoding) -> tuple[PyTree, Array]:
        state, _ = decoder.read(state)  # the last token of the turn
        hidden, cache = decoder.model.apply(decoder.params, tokens, answered, cache=state.cache)
        return cache, hidden[:, -1]

    with jax.named_scope("answers"):
        cache, hidden = jax.lax.cond(more, read, lambda x: (x.cache, episode.hidden), state)
    state = state.replace(
        cache=cache,
        tokens=write(state.tokens, tokens),
        read=write(state.read, answered),
        rewards=jnp.where(last, reward[:, None], state.rewards),
    )
    finished = episode.finished | (~episode.done & seen.done & valid)
    return Episode(episode.turn + 1, episode.world, state, hidden, finished, done)


def _slots(environment: Environment, episode: Episode) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Where the turn begins, and where the answer to it does."""
    begin = episode.turn * (environment.turn_length + environment.observation_length)
    return begin, begin + environment.turn_length


def _goes_on(
    decoder: Decoder, environment: Environment, turn: Int[Array, ""], done: Bool[Array, "B"]
) -> Bool[Array, ""]:
    return decoder.agreed((~done).any()) & (turn < environment.max_turns)


def is_valid(seen: Observation, environment: Environment) -> Bool[Array, "B"]:
    """Whether the answer has 1 to O tokens, or the episode is done, and its reward is
    finite.
    """
    fits = (seen.length >= 1) & (seen.length <= environment.observation_length)
    return (seen.done | fits) & jnp.isfinite(seen.reward)


def _answers(
    seen: Observation, rows: Bool[Array, "B"], *, pad: int
) -> tuple[Int[Array, "B O"], Bool[Array, "B O"]]:
    """(the answers to these rows, aligned on the right, which of the tokens exist)."""
    most = seen.tokens.shape[1]
    exists = jnp.arange(most, dtype=jnp.int32)[None] >= most - seen.length[:, None]
    exists &= rows[:, None]
    return jnp.where(exists, seen.tokens, pad), exists
