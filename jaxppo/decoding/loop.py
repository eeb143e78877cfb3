"""The decode loop: prefill the prompts, then choose token by token into a preallocated
cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxppo import policy, sampling
from jaxppo.config import Config
from jaxppo.decoding import compaction
from jaxppo.models import cache as caches
from jaxppo.models import layout
from jaxppo.types import Model, Params, Prompts, PyTree


class Decoding(struct.PyTreeNode):
    """State of the decode loop: tokens 0..t−1 are chosen, and the cache holds all of
    them but the last.
    """

    t: Int[Array, ""]
    cache: PyTree
    noise: Float[Array, "B T"]
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    raw_logprobs: Float[Array, "B T"]
    values: Float[Array, "B T"]
    finished: Bool[Array, "B"]  # with an end of text or a stop text
    done: Bool[Array, "B"]  # finished, or as long as it may be
    limit: Int[Array, "B"]  # most tokens of a row's response
    stop_state: Int[Array, "B"] | None = None  # of `sampling.Stops`
    entropy: Float[Array, "B T"] | None = None  # for `top_entropy`
    read: Bool[Array, "B T"] | None = None  # answers of the environment
    rewards: Float[Array, "B T"] | None = None  # of the environment


class Decoder(NamedTuple):
    """What stays the same while decoding."""

    model: Model
    params: Params
    sample: Config
    length: int
    eos: int | tuple[int, ...]
    pad: int
    with_values: bool
    greedy: bool
    stops: sampling.Stops | None
    stop_axis: str | None

    def choose(self, state: Decoding, hidden: Float[Array, "B D"]) -> Decoding:
        """Choose token t from the hidden state before it, and record it."""
        model, sample = self.model, self.sample
        hidden, params = layout.gather_after(hidden, self.params)
        logits, allowed = model.logits(params, hidden), model.allowed(params, hidden)
        tempered = sampling.temper(logits, temperature=sample.temperature)
        # greedy ignores the keep-sets; for top-k and top-p this changes nothing
        if self.greedy:
            kept = sampling.bar_eos(tempered, state.t, sample=sample)
        else:
            kept = sampling.process(tempered, sample=sample, allowed=allowed, t=state.t)
        uniform = jax.lax.dynamic_index_in_dim(state.noise, state.t, 1, keepdims=False)
        token = sampling.draw(kept, uniform, greedy=self.greedy)
        logprob, raw, entropy = policy.choices(
            logits, token, config=sample, allowed=allowed, t=state.t
        )
        value = model.value(params, hidden) if self.with_values else jnp.zeros_like(logprob)
        acting = ~state.done
        ended, stop_state = sampling.end_of_response(
            token, state.t, eos=self.eos, sample=sample, stops=self.stops, state=state.stop_state
        )
        write = lambda x, new: jax.lax.dynamic_update_slice(x, new[:, None], (0, state.t))
        write_float = lambda x, new: write(x, jnp.where(acting, new, 0.0))
        finished = state.finished | (acting & ended)
        return state.replace(
            t=state.t + 1,
            tokens=write(state.tokens, jnp.where(acting, token, self.pad)),
            mask=write(state.mask, acting),
            logprobs=write_float(state.logprobs, logprob),
            raw_logprobs=write_float(state.raw_logprobs, raw),
            values=write_float(state.values, value),
            finished=finished,
            done=finished | (state.t + 1 >= state.limit),
            stop_state=stop_state,
            entropy=None if state.entropy is None else write_float(state.entropy, entropy),
        )

    def step(self, state: Decoding) -> Decoding:
        """Read the last token, and choose the next."""
        return self.choose(*self.read(state))

    def read(self, state: Decoding) -> tuple[Decoding, Float[Array, "B D"]]:
        """Read the last token: the hidden state after it."""
        rows = state.tokens.shape[0]
        last = jax.lax.dynamic_slice(state.tokens, (0, state.t - 1), (rows, 1))
        acted = jax.lax.dynamic_slice(state.mask, (0, state.t - 1), (rows, 1))
        hidden, cache = self.model.apply(self.params, last, acted, cache=state.cache)
        return state.replace(cache=cache), hidden[:, -1]

    def running(self, state: Decoding) -> Bool[Array, ""]:
        """Whether a row has not ended."""
        return (state.t < self.length) & self.agreed((~state.done).any())

    def agreed(self, this: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether it holds in any program of `stop_axis`: a condition per program would
        copy the cache at each token.
        """
        if self.stop_axis is None:
            return this
        return jax.lax.pmax(this.astype(jnp.int32), self.stop_axis) > 0


def prefill(
    decoder: Decoder, prompts: Prompts, noise: Float[Array, "B T"], *, group_size: int | None
) -> tuple[Decoding, Float[Array, "B D"]]:
    """(the state before the first token, the hidden state that chooses it). With a
    group size, a prompt is read once for its group; None is the plain form.
    """
    model, params, pad = decoder.model, decoder.params, decoder.pad
    (rows, prompt_length), length = prompts.tokens.shape, noise.shape[1]
    zeros = jnp.zeros((rows, length), jnp.float32)
    limit = jnp.asarray(prompts.extra.get("max_tokens", length), jnp.int32)
    context = policy.context(prompts.extra)
    if group_size is None:
        cache = model.init_cache(rows, prompt_length + length, model.dtype)
        hidden, cache = model.apply(
            params, prompts.tokens, prompts.mask, cache=cache, context=context
        )
        last = hidden[:, -1]
    else:
        first = lambda x: x.reshape(-1, group_size, *x.shape[1:])[:, 0]
        cache = model.init_cache(rows // group_size, prompt_length, model.dtype)
        hidden, cache = model.apply(params, first(prompts.tokens), first(prompts.mask), cache=cache)
        last = jnp.repeat(hidden[:, -1], group_size, 0)
        cache = model.init_cache(rows, length, model.dtype, prompt=cache)
    state = Decoding(
        t=jnp.zeros((), jnp.int32),
        cache=cache,
        noise=noise,
        tokens=jnp.full((rows, length), pad, jnp.int32),
        mask=jnp.zeros((rows, length), bool),
        logprobs=zeros,
        raw_logprobs=zeros,
        values=zeros,
        finished=jnp.zeros((rows,), bool),
        done=jnp.zeros((rows,), bool),
        limit=jnp.broadcast_to(jnp.minimum(limit, length), (rows,)),
        stop_state=None if decoder.stops is None else jnp.zeros((rows,), jnp.int32),
        entropy=zeros if decoder.sample.top_entropy < 1 else None,
    )
    return state, last


def decode(
    decoder: Decoder, state: Decoding, hidden: Float[Array, "B D"], *, group_size: int | None
) -> Decoding:
    """Decode until all rows have ended. With a group size, rows that have ended stop
    costing.
    """
    rows, length = state.tokens.shape
    state = decoder.choose(state, hidden)
    if group_size is None:
        with jax.named_scope("decode"):
            return jax.lax.while_loop(decoder.running, decoder.step, state)
    shards = layout.row_shards(rows // group_size)
    sizes = compaction.sizes(rows // group_size // shards, group_size, length)
    return _decode_in_phases(decoder, state, sizes, "decode")


def _decode_in_phases(
    decoder: Decoder, state: Decoding, sizes: Sequence[compaction.Size], name: str
) -> Decoding:
    """Decode with rows of the first size until the next one holds all that have not
    ended, then go on with those.

    name: of the loop, in plans.
    """
    if len(sizes) == 1:
        with jax.named_scope(name):
            return jax.lax.while_loop(decoder.running, decoder.step, state)
    now, after = sizes[:2]
    live = lambda state: (~state.done).reshape(-1, *now)
    full = lambda state: decoder.agreed(~compaction.fits(live(state), after))
    with jax.named_scope(name):
        state = jax.lax.while_loop(
            lambda state: decoder.running(state) & full(state), decoder.step, state
        )
    rows, prompts = compaction.choose(live(state), after)
    take = lambda x: compaction.take(x, rows) if jnp.ndim(x) else x
    cache = caches.take(state.cache, take, lambda x: compaction.take(x, prompts))
    fewer = jax.tree.map(take, state.replace(cache=None)).replace(cache=cache)
    fewer = _decode_in_phases(decoder, fewer, sizes[1:], "fewer_rows").replace(cache=None)
    put = lambda x, new: compaction.put(x, rows, new) if jnp.ndim(x) else new
    return jax.tree.map(put, state.replace(cache=None), fewer)
