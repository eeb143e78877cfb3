"""Generate responses: prefill the prompts, then decode token by token into a
preallocated cache, all inside the program.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxppo import policy, sampling
from jaxppo.config import Config
from jaxppo.models import lora
from jaxppo.types import Model, Params, Prompts, PyTree, Rollout


class Decoding(struct.PyTreeNode):
    """State of the decode loop: tokens 0..t−1 are chosen, and the cache holds all of
    them but the last.
    """

    t: Int[Array, ""]
    cache: PyTree
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    raw_logprobs: Float[Array, "B T"]
    values: Float[Array, "B T"]
    finished: Bool[Array, "B"]
    stop_state: Int[Array, "B"] | None = None  # of `sampling.Stops`


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
    stop_axis: str | None = None,
) -> Rollout:
    """Sample a response to each prompt, and compute the reference's log-probs of it.

    The log-probs and values are those of the decode loop, so nothing is computed twice.

    Args:
      keys: the noise, from `sampling.row_uniforms`.
      length: most tokens of a response; decoding stops when every row has ended.
      sample: temperature, top_k, top_p, min_tokens, stop, and the ids `eos` (one or
        several that end a response) and `pad` unless given. Stop texts need
        frozen["stop"], the `sampling.Stops` that `token_bytes.make_stops` makes from
        them: an operand of the program, which the tokenizer's table would bloat as a
        constant.
      greedy: take the likeliest token; reference log-probs are 0.
      stop_axis: a vmapped axis whose programs decode until all of them have ended.
    """
    eos, pad = sample.eos if eos is None else eos, sample.pad if pad is None else pad
    if sample.stop and "stop" not in frozen:
        raise ValueError('stop texts need frozen["stop"] (`pretrained.token_bytes.make_stops`)')
    stops = frozen["stop"] if sample.stop else None
    whole = policy.cast(lora.merge(frozen["base"], params), model.dtype)
    with jax.named_scope("generate"):  # the names appear in plans and profiles
        done = _decode(
            model,
            whole,
            prompts,
            keys,
            length,
            sample,
            eos,
            pad,
            with_values,
            greedy,
            stop_axis,
            stops,
        )
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
    )
    if greedy:
        return out  # a baseline: only its reward is used
    with jax.named_scope("reference"):
        reference = policy.response_logprobs(
            model, reference_params(params, frozen), out, config=sample, with_values=False
        )
    return out.replace(ref_logprobs=reference.raw_logprobs * out.mask)


def replace_nonfinite(rolled: Rollout) -> tuple[Rollout, Bool[Array, "B"]]:
    """(the rollout with log-probs and values of non-finite rows set to 0, which rows
    were finite).

    NaN logits raise no error when sampling: every draw gives the same token, so the row
    must not count.
    """
    parts = {name: getattr(rolled, name) for name in ("logprobs", "raw_logprobs", "values")}
    good = jnp.all(jnp.stack([jnp.isfinite(x).all(1) for x in parts.values()]), 0)
    return rolled.replace(**{n: jnp.where(good[:, None], x, 0.0) for n, x in parts.items()}), good


def _decode(
    model,
    params,
    prompts,
    noise,
    length,
    sample,
    eos,
    pad,
    with_values,
    greedy,
    stop_axis,
    stops=None,
) -> Decoding:
    rows, prompt_length = prompts.tokens.shape
    zeros = jnp.zeros((rows, length), jnp.float32)
    state = Decoding(
        t=jnp.zeros((), jnp.int32),
        cache=model.init_cache(rows, prompt_length + length, model.dtype),
        tokens=jnp.full((rows, length), pad, jnp.int32),
        mask=jnp.zeros((rows, length), bool),
        logprobs=zeros,
        raw_logprobs=zeros,
        values=zeros,
        finished=jnp.zeros((rows,), bool),
        stop_state=None if stops is None else jnp.zeros((rows,), jnp.int32),
    )

    def read(state: Decoding, tokens, attend, context=None) -> tuple[Decoding, Array]:
        """Feed tokens to the model: its new cache, and the last hidden states [B D]."""
        hidden, cache = model.apply(params, tokens, attend, cache=state.cache, context=context)
        return state.replace(cache=cache), hidden[:, -1]

    def choose(state: Decoding, hidden: Float[Array, "B D"]) -> Decoding:
        """Choose token t from the hidden state before it, and record it."""
        logits, allowed = model.logits(params, hidden), model.allowed(params, hidden)
        tempered = sampling.temper(logits, temperature=sample.temperature)
        # greedy ignores the keep-sets; for top-k and top-p this changes nothing
        if greedy:
            kept = sampling.bar_eos(tempered, state.t, sample=sample)
        else:
            kept = sampling.process(tempered, sample=sample, allowed=allowed, t=state.t)
        uniform = jax.lax.dynamic_index_in_dim(noise, state.t, 1, keepdims=False)
        token = sampling.draw(kept, uniform, greedy=greedy)
        logprob, raw, _ = policy.choices(logits, token, config=sample, allowed=allowed, t=state.t)
        value = model.value(params, hidden) if with_values else jnp.zeros((rows,), jnp.float32)
        acting = ~state.finished
        ended, stop_state = sampling.end_of_response(
            token, state.t, eos=eos, sample=sample, stops=stops, state=state.stop_state
        )
        write = lambda x, new: jax.lax.dynamic_update_slice(x, new[:, None], (0, state.t))
        write_float = lambda x, new: write(x, jnp.where(acting, new, 0.0))
        return state.replace(
            t=state.t + 1,
            tokens=write(state.tokens, jnp.where(acting, token, pad)),
            mask=write(state.mask, acting),
            logprobs=write_float(state.logprobs, logprob),
            raw_logprobs=write_float(state.raw_logprobs, raw),
            values=write_float(state.values, value),
            finished=state.finished | (acting & ended),
            stop_state=stop_state,
        )

    def step(state: Decoding) -> Decoding:
        last = jax.lax.dynamic_slice(state.tokens, (0, state.t - 1), (rows, 1))
        acted = jax.lax.dynamic_slice(state.mask, (0, state.t - 1), (rows, 1))
        return choose(*read(state, last, acted))

    def not_done(state: Decoding) -> Bool[Array, ""]:
        running = (~state.finished).any()
        # a condition per run would copy the cache at each token
        if stop_axis is not None:
            running = jax.lax.pmax(running.astype(jnp.int32), stop_axis) > 0
        return (state.t < length) & running

    first = choose(*read(state, prompts.tokens, prompts.mask, policy.context(prompts.extra)))
    with jax.named_scope("decode"):
        return jax.lax.while_loop(not_done, step, first)
