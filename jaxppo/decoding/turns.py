"""Episodes of several turns: the policy writes, the environment answers, the policy
reads the answer.

All rows write up to M tokens, then the environment answers each with up to O, and so
on, in lock-step. Turn k begins in slot k (M + O) of the response, and the answer to it
ends where the next begins.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxppo.config import Config
from jaxppo.decoding.loop import Decoder, Decoding
from jaxppo.errors import UserError
from jaxppo.types import Environment, Observation, Prompts, PyTree, Turn


class Episodes(struct.PyTreeNode):
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


def play(
    decoder: Decoder,
    environment: Environment,
    world: PyTree,
    state: Decoding,
    hidden: Float[Array, "B D"],
) -> Decoding:
    """Decode turn after turn until all episodes have ended.

    An answer of no token or of more than O, or a reward that is not finite, ends the
    episode of its row with the reward NaN, so that the row is invalid. What the
    environment says of a row after its end is ignored.
    """
    nothing = jnp.zeros(state.tokens.shape, bool)
    state = state.replace(read=nothing, rewards=nothing.astype(jnp.float32))
    nobody = nothing[:, 0]
    start = Episodes(jnp.zeros((), jnp.int32), world, state, hidden, nobody, nobody)
    more = lambda episodes: _goes_on(decoder, environment, episodes.turn, episodes.done)
    played = jax.lax.while_loop(more, partial(_play_turn, decoder, environment), start)
    return played.decoding.replace(finished=played.finished)


def _goes_on(
    decoder: Decoder, environment: Environment, turn: Int[Array, ""], done: Bool[Array, "B"]
) -> Bool[Array, ""]:
    return decoder.agreed((~done).any()) & (turn < environment.max_turns)


def _play_turn(decoder: Decoder, environment: Environment, old: Episodes) -> Episodes:
    """Write a turn in every row that has not ended, and read the answers."""
    begin = old.turn * (environment.turn_length + environment.observation_length)
    end = begin + environment.turn_length
    state = _write(decoder, old, begin, end)
    assert state.read is not None and state.rewards is not None  # `play` made them
    cut = lambda x: jax.lax.dynamic_slice(x, (0, begin), (len(x), environment.turn_length))
    turn = Turn(cut(state.tokens), cut(state.mask).sum(1, dtype=jnp.int32))
    with jax.named_scope("environment"):
        world, seen = environment.step(old.world, turn)
    valid = is_valid(seen, environment)
    reward = jnp.where(valid, seen.reward, jnp.nan)
    slots = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)[None]
    last = (slots == (begin + turn.length - 1)[:, None]) & ~old.done[:, None]
    done = old.done | seen.done | ~valid
    more = _goes_on(decoder, environment, old.turn + 1, done)
    tokens, answered = _answers(seen, ~done & more, pad=decoder.pad)
    write = lambda x, new: jax.lax.dynamic_update_slice(x, new, (0, end))

    def read(state: Decoding) -> tuple[PyTree, Array]:
        state, _ = decoder.read(state)  # the last token of the turn
        hidden, cache = decoder.model.apply(decoder.params, tokens, answered, cache=state.cache)
        return cache, hidden[:, -1]

    with jax.named_scope("answers"):
        cache, hidden = jax.lax.cond(more, read, lambda x: (x.cache, old.hidden), state)
    state = state.replace(
        cache=cache,
        tokens=write(state.tokens, tokens),
        read=write(state.read, answered),
        rewards=jnp.where(last, reward[:, None], state.rewards),
    )
    finished = old.finished | (~old.done & seen.done & valid)
    return Episodes(old.turn + 1, world, state, hidden, finished, done)


def _write(decoder: Decoder, old: Episodes, begin: Int[Array, ""], end: Int[Array, ""]) -> Decoding:
    """The state after a turn from slot `begin` to `end` at the latest."""
    state = old.decoding
    state = state.replace(
        t=begin,
        finished=old.done,
        done=old.done,
        limit=jnp.broadcast_to(end, old.done.shape),
        stop_state=None if state.stop_state is None else jnp.zeros_like(state.stop_state),
    )
    with jax.named_scope("decode"):
        state = decoder.choose(state, old.hidden)
        return jax.lax.while_loop(decoder.running, decoder.step, state)


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
