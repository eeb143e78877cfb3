"""Generate responses: prefill the prompts, then decode token by token into a
preallocated cache, all inside the program.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxppo import compaction, masked, packing, policy, sampling
from jaxppo.config import Config
from jaxppo.models import cache as caches
from jaxppo.models import int8, layout, lora
from jaxppo.models.scan import unstack_layers
from jaxppo.types import Model, Params, Prompts, PyTree, Rollout


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


def reference_params(params: Params, frozen: Params) -> Params:
    """The whole reference policy: its own copy, or the base below the adapters."""
    whole = frozen["base"] if frozen["reference"] is None else frozen["reference"]
    return {name: x for name, x in whole.items() if name not in ("critic", "lagged")}


def rollout(
    model: Model,
    params: Params,
    frozen: Params,
    prompts: Prompts,
    keys: Float[Array, "B T"],
    *,
    length: int,
    sample: Config,
    eos: int | tuple[int, ...] | None = None,
    pad: int | None = None,
    with_values: bool = True,
    greedy: bool = False,
    group_size: int = 1,
    stop_axis: str | None = None,
    decode_dtype: str = "same",
) -> Rollout:
    """Sample a response to each prompt, and compute the reference's log-probs of it.

    The log-probs and values are those of the decode loop, so nothing is computed twice,
    unless its weights are others (`decode_dtype`): then `rescore` is needed.

    Args:
      keys: the noise, from `sampling.row_uniforms`.
      prompts: `extra["max_tokens"]`, Int[B], limits single rows further.
      length: most tokens of a response; decoding stops when every row has ended.
      sample: temperature, top_k, top_p, min_tokens, stop, and the ids `eos` (one or
        several that end a response) and `pad` unless given. Stop texts need
        frozen["stop"], the `sampling.Stops` that `token_bytes.make_stops` makes from
        them: an operand of the program, which the tokenizer's table would bloat as a
        constant.
      greedy: take the likeliest token; reference log-probs are 0.
      group_size: so many adjacent rows have the same prompt, which is read once.
      stop_axis: a vmapped axis whose programs decode until all of them have ended.
      decode_dtype: int8: sample, prompts included, with the policy's weights in 8 bits,
        without values.
    """
    eos, pad = sample.eos if eos is None else eos, sample.pad if pad is None else pad
    if sample.stop and "stop" not in frozen:
        raise ValueError('stop texts need frozen["stop"] (`pretrained.token_bytes.make_stops`)')
    stops = frozen["stop"] if sample.stop else None
    whole = lora.merge(frozen["base"], params)
    if decode_dtype == "int8":
        # Prompts are read with them, too: the sampler is one network, whose log-probs
        # the corrections take.
        whole, with_values = int8.sampling_weights(whole, alpha=lora.alpha_of(sample)), False
    whole = policy.cast(whole, model.dtype)
    packed = packing.is_packed(model, sample)
    # once: a slice of stacked weights would be a copy at each token
    whole = unstack_layers(whole)
    decoder = Decoder(model, whole, sample, length, eos, pad, with_values, greedy, stops, stop_axis)
    with jax.named_scope("generate"):  # the names appear in plans and profiles
        done = _decode(decoder, prompts, keys, group_size=group_size if packed else None)
    out = Rollout(
        tokens=jnp.concatenate([prompts.tokens, done.tokens], 1),
        attend=jnp.concatenate([prompts.mask, done.mask], 1),
        mask=done.mask.astype(jnp.float32),
        finished=done.finished,
        logprobs=done.logprobs,
        raw_logprobs=done.raw_logprobs,
        ref_logprobs=jnp.zeros_like(done.logprobs),
        values=done.values,
        index=prompts.index,
        extra=prompts.extra,
        entropy=done.entropy,
    )
    if greedy:
        return out  # a baseline: only its reward is used
    with jax.named_scope("reference"):
        reference = policy.rollout_logprobs(
            model,
            reference_params(params, frozen),
            out,
            config=sample,
            group_size=group_size,
            axes=(stop_axis,),
        )
    return out.replace(ref_logprobs=reference.raw_logprobs * out.mask)


def rescore(
    model: Model,
    params: Params,
    frozen: Params,
    rolled: Rollout,
    *,
    config: Config,
    with_values: bool,
    axes: tuple[str | None, ...] = (),
) -> Rollout:
    """The rollout with old log-probs of the scorer. With `decode_dtype` the sampler's
    weights are not the policy's: log-probs for the KL, values and entropies are the
    scorer's, too, and `logprobs` alone stay the sampler's, for corrections.
    """
    other = config.decode_dtype != "same"
    found = policy.rollout_logprobs(
        model,
        lora.merge(frozen["base"], params),
        rolled,
        config=config,
        group_size=config.group_size,
        axes=axes,
        with_values=with_values and other,
    )
    found = jax.tree.map(lambda x: masked.keep(x, rolled.mask), found)
    rolled = rolled.replace(old_logprobs=found.logprobs)
    if not other:
        return rolled
    entropy = None if rolled.entropy is None else found.entropy
    return rolled.replace(raw_logprobs=found.raw_logprobs, values=found.values, entropy=entropy)


def replace_nonfinite(rolled: Rollout) -> tuple[Rollout, Bool[Array, "B"]]:
    """(the rollout with log-probs and values of non-finite rows set to 0, which rows
    were finite).

    NaN logits raise no error when sampling: every draw gives the same token, so the row
    must not count.
    """
    names = ("logprobs", "raw_logprobs", "values", "old_logprobs")
    parts = {name: x for name in names if (x := getattr(rolled, name)) is not None}
    good = jnp.all(jnp.stack([jnp.isfinite(x).all(1) for x in parts.values()]), 0)
    return rolled.replace(**{n: jnp.where(good[:, None], x, 0.0) for n, x in parts.items()}), good


def _decode(
    decoder: "Decoder", prompts: Prompts, noise: Float[Array, "B T"], *, group_size: int | None
) -> Decoding:
    """Prefill the prompts and decode until all rows have ended. With a group size, a
    prompt is read once for its group, and rows that have ended stop costing; None is
    the plain form.
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
    state = decoder.choose(state, last)
    if group_size is None:
        with jax.named_scope("decode"):
            return jax.lax.while_loop(decoder.running, decoder.step, state)
    shards = layout.row_shards(rows // group_size)
    sizes = compaction.sizes(rows // group_size // shards, group_size, length)
    return _decode_in_phases(decoder, state, sizes, "decode")


def _decode_in_phases(
    decoder: "Decoder", state: Decoding, sizes: Sequence[compaction.Size], name: str
) -> Decoding:
    """Decode with rows of the first size until the next one holds all that have not
    ended, then go on with those.

    name: of the loop, in plans.
    """
    if len(sizes) == 1:
        with jax.named_scope(name):
            return jax.lax.while_loop(decoder.running, decoder.step, state)
    now, after = sizes[:2]
    live = lambda state: compaction.by_shard(~state.done, now)
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
        rows = state.tokens.shape[0]
        last = jax.lax.dynamic_slice(state.tokens, (0, state.t - 1), (rows, 1))
        acted = jax.lax.dynamic_slice(state.mask, (0, state.t - 1), (rows, 1))
        hidden, cache = self.model.apply(self.params, last, acted, cache=state.cache)
        return self.choose(state.replace(cache=cache), hidden[:, -1])

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
