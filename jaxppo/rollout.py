"""Generate responses, or episodes of several turns, and compute their log-probs under
the reference, all inside the step's program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxppo import masked, packing, policy, sampling
from jaxppo.config import Config
from jaxppo.decoding import loop, turns
from jaxppo.models import int8, lora
from jaxppo.models.scan import unstack_layers
from jaxppo.types import Environment, Model, Params, Parts, Prompts, Rollout


def reference_params(frozen: Params) -> Params:
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
    environment: Environment | None = None,
    world_keys: Key[Array, "B"] | None = None,
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
      environment: answers the turns of a response; `finished` is then that it ended the
        episode.
      world_keys: its randomness in each row.
      decode_dtype: int8: sample, prompts included, with the policy's weights in 8 bits,
        without values.
    """
    if environment is not None:
        turns.check_environment(environment, sample, length, prompts)
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
    decoder = loop.Decoder(
        model, whole, sample, length, eos, pad, with_values, greedy, stops, stop_axis
    )
    with jax.named_scope("generate"):  # the names appear in plans and profiles
        state, hidden = loop.prefill(
            decoder, prompts, keys, group_size=group_size if packed else None
        )
        if environment is None:
            done = loop.decode(decoder, state, hidden, group_size=group_size if packed else None)
        else:
            assert world_keys is not None, "an environment needs keys"
            world = environment.reset(prompts.extra, world_keys)
            start = turns.first_episode(world, state, hidden)
            done = turns.play(decoder, environment, start)
    read = done.mask if done.read is None else done.mask | done.read
    out = Rollout(
        tokens=jnp.concatenate([prompts.tokens, done.tokens], 1),
        attend=jnp.concatenate([prompts.mask, read], 1),
        mask=done.mask.astype(jnp.float32),
        finished=done.finished,
        logprobs=done.logprobs,
        raw_logprobs=done.raw_logprobs,
        ref_logprobs=jnp.zeros_like(done.logprobs),
        values=done.values,
        index=prompts.index,
        extra=prompts.extra,
        entropy=done.entropy,
        rewards=done.rewards,
    )
    if greedy:
        return out  # a baseline: only its reward is used
    with jax.named_scope("reference"):
        reference = policy.rollout_logprobs(
            model,
            reference_params(frozen),
            out,
            config=sample,
            group_size=group_size,
            axes=(stop_axis,),
        )
    return out.replace(ref_logprobs=reference.raw_logprobs * out.mask)


def sample_responses(
    config: Config,
    model: Model,
    params: Params,
    frozen: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    *,
    with_values: bool = False,
    **options: Any,
) -> Rollout:
    """`rollout` with the settings' length, and noise from `key` and the prompts'
    indices, whatever the other options.
    """
    return rollout(
        model,
        params,
        frozen,
        prompts,
        sampling.row_uniforms(key, prompts.index, config.response_length),
        length=config.response_length,
        sample=config,
        with_values=with_values,
        world_keys=sampling.world_keys(key, prompts.index),
        **options,
    )


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
    with jax.named_scope("rescore"):
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


def reward_kl(
    model: Model,
    parts: Parts,
    config: Config,
    params: Params,
    frozen: Params,
    rolled: Rollout,
    axes: tuple[str | None, ...],
) -> Callable[[Array, Array], Array]:
    """The function (logprobs, ref_logprobs) -> KL a token for the reward; zeros if the
    KL is in the loss. A full KL is computed beforehand and ignores its arguments.
    """
    if config.kl_place != "reward":
        return lambda logprobs, _: jnp.zeros_like(logprobs)
    if not parts.full_kl:
        return parts.kl
    whole, reference = lora.merge(frozen["base"], params), reference_params(frozen)
    total = packing.make_sum(
        model, config, rolled, rolled.mask, group_size=config.group_size, axes=axes
    )
    exact = total(
        lambda part: policy.full_kl(
            model, whole, reference, rolled, config=config, divergence=parts.kl, part=part
        )
    )
    return lambda *_: exact


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
