"""Text from the policy: prefill the prompts, then decode token by token into a
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
    """State of the decode loop before token `t` is fed back: everything up to and
    including token t − 1 is chosen.
    """

    t: Int[Array, ""]
    cache: PyTree
    guide_cache: PyTree  # of NLPO's lagged policy, or None
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    raw_logprobs: Float[Array, "B T"]
    values: Float[Array, "B T"]
    finished: Bool[Array, "B"]


def reference_params(params: Params, frozen: Params) -> Params:
    """The reference policy: its own copy, or the base below the adapters; never a
    critic.
    """
    whole = frozen["base"] if frozen["reference"] is None else frozen["reference"]
    return {name: x for name, x in whole.items() if name != "critic"}


def rollout(
    model: Model,
    params: Params,
    frozen: Params,
    prompts: Prompts,
    keys: Float[Array, "B T"],
    *,
    length: int,
    sample: Config,
    eos: int | None = None,
    pad: int | None = None,
    with_values: bool = True,
    greedy: bool = False,
    lagged: Params | None = None,
    stop_axis: str | None = None,
) -> Rollout:
    """Sample a response to each prompt, and score it with the reference policy.

    `keys` is the noise of `sampling.row_uniforms`; `length` the most tokens; `sample`
    holds temperature, top_k, top_p, and the ids `eos` and `pad` unless they are given.
    The loop stops when every row has ended (of all programs of `stop_axis`, under
    vmap). The log-probs and values are those the decoder saw, so nothing is scored
    twice. `lagged` holds the trained parameters of NLPO's older policy, whose nucleus
    masks this one's choices.
    """
    eos, pad = sample.eos if eos is None else eos, sample.pad if pad is None else pad
    whole = policy.cast(lora.merge(frozen["base"], params), model.dtype)
    guide = None if lagged is None else policy.cast(lora.merge(frozen["base"], lagged), model.dtype)
    with jax.named_scope("generate"):  # names that a plan and a profile show
        done = _decode(
            model,
            whole,
            guide,
            prompts,
            keys,
            length,
            sample,
            eos,
            pad,
            with_values,
            greedy,
            stop_axis,
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
        return out  # a baseline: only its reward is asked for
    with jax.named_scope("reference"):
        reference = policy.token_logprobs(
            model, reference_params(params, frozen), out, config=sample, with_values=False
        )
    return out.replace(ref_logprobs=reference.raw_logprobs * out.mask)


def only_finite(rolled: Rollout) -> tuple[Rollout, Bool[Array, "B"]]:
    """(the rollout with 0 in place of numbers that are not finite, which rows had none
    of those).

    A row whose logits are NaN is sampled without an error (as some token, always the
    same): it must not count.
    """
    parts = {name: getattr(rolled, name) for name in ("logprobs", "raw_logprobs", "values")}
    good = jnp.all(jnp.stack([jnp.isfinite(x).all(1) for x in parts.values()]), 0)
    return rolled.replace(
        **{name: jnp.where(good[:, None], x, 0.0) for name, x in parts.items()}
    ), good


def _decode(
    model, params, guide, prompts, noise, length, sample, eos, pad, with_values, greedy, stop_axis
) -> Decoding:
    rows, prompt_length = prompts.tokens.shape
    zeros = jnp.zeros((rows, length), jnp.float32)
    state = Decoding(
        t=jnp.zeros((), jnp.int32),
        cache=model.init_cache(rows, prompt_length + length, model.dtype),
        guide_cache=None
        if guide is None
        else model.init_cache(rows, prompt_length + length, model.dtype),
        tokens=jnp.full((rows, length), pad, jnp.int32),
        mask=jnp.zeros((rows, length), bool),
        logprobs=zeros,
        raw_logprobs=zeros,
        values=zeros,
        finished=jnp.zeros((rows,), bool),
    )

    def read(state: Decoding, tokens, attend, context=None) -> tuple[Decoding, Array, Array | None]:
        """Feed tokens to the policy (and to the lagged one): the new caches, and the
        last hidden states [B D]. A context goes in with the prompt; from then on the
        caches have it.
        """
        hidden, cache = model.apply(params, tokens, attend, cache=state.cache, context=context)
        if guide is None:
            return state.replace(cache=cache), hidden[:, -1], None
        older, guide_cache = model.apply(
            guide, tokens, attend, cache=state.guide_cache, context=context
        )
        return state.replace(cache=cache, guide_cache=guide_cache), hidden[:, -1], older[:, -1]

    def choose(
        state: Decoding, hidden: Float[Array, "B D"], older: Float[Array, "B D"] | None
    ) -> Decoding:
        """Choose token t from the hidden state before it, and write down what was
        chosen.
        """
        logits = model.logits(params, hidden)
        guiding = None if guide is None else model.logits(guide, older)
        kept = sampling.process(
            sampling.temper(logits, temperature=sample.temperature), sample=sample, guide=guiding
        )
        uniform = jax.lax.dynamic_index_in_dim(noise, state.t, 1, keepdims=False)
        token = sampling.draw(kept, uniform, greedy=greedy)
        logprob, raw, _ = policy.choices(logits, token, config=sample, guide=guiding)
        value = model.value(params, hidden) if with_values else jnp.zeros((rows,), jnp.float32)
        acting = ~state.finished
        put = lambda x, new: jax.lax.dynamic_update_slice(
            x, jnp.where(acting, new, 0.0)[:, None], (0, state.t)
        )
        token = jnp.where(acting, token, pad)
        return state.replace(
            t=state.t + 1,
            tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.t)),
            mask=jax.lax.dynamic_update_slice(state.mask, acting[:, None], (0, state.t)),
            logprobs=put(state.logprobs, logprob),
            raw_logprobs=put(state.raw_logprobs, raw),
            values=put(state.values, value),
            finished=state.finished | (acting & (token == eos)),
        )

    def step(state: Decoding) -> Decoding:
        last = jax.lax.dynamic_slice(state.tokens, (0, state.t - 1), (rows, 1))
        acted = jax.lax.dynamic_slice(state.mask, (0, state.t - 1), (rows, 1))
        return choose(*read(state, last, acted))

    def going_on(state: Decoding) -> Bool[Array, ""]:
        running = (~state.finished).any()
        if (
            stop_axis is not None
            # one condition for all: a batched one would copy the whole cache at every token
        ):
            running = jax.lax.pmax(running.astype(jnp.int32), stop_axis) > 0
        return (state.t < length) & running

    first = choose(*read(state, prompts.tokens, prompts.mask, policy.context(prompts.extra)))
    with jax.named_scope("decode"):
        return jax.lax.while_loop(going_on, step, first)
