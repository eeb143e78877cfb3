"""A policy, put together: the checkpoint's weights, adapters, a critic, and what is trained of it."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxppo import algorithms, pretrained, processes, sharding
from jaxppo import policy as policies
from jaxppo.config import Config, ModelConfig, RunConfig, UserError
from jaxppo.fetch import cache_folder
from jaxppo.models import init_value, lora, make, stack, unstack, with_critic
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.types import Model, Params, TrainState

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Policy:
    """A model with its weights, cut into what is trained and what is not."""

    model: Model
    params: Params  # trained
    frozen: dict[str, Any]  # base, reference, and a place for the reward model
    tokenizer: Tokenizer
    shape: ModelConfig


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache, readable by the user alone: who can write there can run code here. A folder
    that belongs to somebody else, or that others can write to, is not used, and a line says so."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache_folder() / "xla"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        print(f"warning: others can write to {folder}: compiled programs are not kept; chmod 700 it, or set JAXPPO_CACHE")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def make_model(config: Config, shape: ModelConfig) -> tuple[Model, bool]:
    """(the model of this shape with the settings' adapters, types and critic, whether the critic is a network of its own)."""
    model = make(
        shape, dtype=config.dtype, lora=config.lora, lora_alpha=config.lora_alpha, remat=config.remat, scan=config.scan_layers
    )
    separate = config.critic == "separate" and config.value_loss != "none"
    return (with_critic(model, model, width=shape.width) if separate else model), separate


def put_together(
    config: C,
    model_config: ModelConfig,
    weights: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    reward: Params | None = None,
    mesh: Mesh | None = None,
) -> tuple[C, Policy]:
    """`load_policy` of weights that are at hand: a network's without a value head."""
    if config.length > model_config.max_length:  # positions beyond the table would be clamped without a word
        raise UserError(
            f"--prompt-length {config.prompt_length} + --response-length {config.response_length} = {config.length} tokens, "
            f"but the model takes {model_config.max_length}; lower one of them"
        )
    largest = max(tokenizer.vocab_size - 1, tokenizer.eos_id, tokenizer.pad_id)
    if largest >= model_config.vocab_size:  # an embedding beyond its end is NaN, without a word
        raise UserError(
            f"the tokenizer has ids up to {largest}, but the model's vocabulary has {model_config.vocab_size}; use its own"
        )
    weights = stack(dict(weights)) if config.scan_layers else dict(weights)
    algorithms.check(config)  # a wrong name is found before anything is compiled
    model, separate = make_model(config, model_config)
    if separate:
        weights = {**weights, "critic": weights}  # it starts from the same weights; with adapters it shares them
    key = jax.random.key(config.seed)
    known = {path for path, _ in _leaves(weights)}
    # Only the leaves that the checkpoint lacks (adapters, value head) are computed; the rest is dead code to the compiler.
    new = jax.jit(lambda key: lora.split(model.init(key), lambda path: path not in known)[0])(key)
    copied = lambda tree: jax.tree.map(jnp.array, tree) if mesh is None else sharding.place(tree, mesh)
    has_critic = config.value_loss != "none"
    if config.lora:
        # The base is only ever an operand: rounded here once, it takes half the memory and no time in the step.
        own = {name: x for name, x in weights.items() if name != "critic"}
        base = policies.cast(jax.tree.map(jnp.asarray, own) if mesh is None else copied(own), model.dtype)
        base = {**base, "critic": base} if "critic" in weights else base
        params, frozen = new, {"base": base, "reference": None, "reward": {}}
    else:
        # `params` is donated to each step, the reference is not, so each has buffers of its own.
        reference = copied({name: x for name, x in weights.items() if name != "critic"})
        params = lora.merge(copied(weights), new)
        frozen = {"base": {}, "reference": reference, "reward": {}}
    if has_critic and config.value_init != "zero":
        params = init_value(params, jax.random.fold_in(key, 1), config.value_init, reward)
    params = params if mesh is None else sharding.place(params, mesh)
    config = dataclasses.replace(config, eos=tokenizer.eos_id, pad=tokenizer.pad_id)
    return config, Policy(model, params, frozen, tokenizer, model_config)


def language_model(config: Config, policy: Policy, state: TrainState) -> Params:
    """The trained network as a checkpoint's parameters (`pretrained.save`): adapters folded in, layers unrolled, no critic."""
    merged = lora.merge(policy.frozen["base"], state.params)
    own = {name: x for name, x in merged.items() if name not in ("value", "critic")}
    return jax.tree.map(lambda x: x.astype(jnp.float32), unstack(lora.fold(own, alpha=config.lora_alpha)))


def keep_model(config: Config, policy: Policy, state: TrainState, place: Path) -> Path:
    """The trained network as a checkpoint in a folder, which is returned, in place of the one that is there; of several processes
    the first writes."""
    whole = jax.device_get(processes.here(language_model(config, policy, state)))
    if processes.is_main():
        shutil.rmtree(place, ignore_errors=True)
        pretrained.save(place, policy.shape, whole, policy.tokenizer)
    processes.wait_for_all(f"{place.parent.name}/{place.name} is kept")
    return place


def _leaves(tree: Mapping, path: tuple = ()):
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            yield from _leaves(leaf, (*path, name))
        else:
            yield (*path, name), leaf
