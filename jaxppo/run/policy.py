"""A policy: a network with its weights, what is trained apart from what is frozen, and
its tokenizer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from jaxppo import algorithms
from jaxppo import policy as policies
from jaxppo.config import Config, RunConfig
from jaxppo.errors import UserError
from jaxppo.models import int8, lora, make_model, missing
from jaxppo.models.critic import init_value
from jaxppo.models.scan import stack_layers
from jaxppo.models.shapes import ModelConfig
from jaxppo.parallel import sharding
from jaxppo.pretrained import token_bytes
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run.settings import read_config
from jaxppo.types import Model, Params

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Policy:
    """A model with its weights, split into what is trained and what is frozen."""

    model: Model
    params: Params  # trained
    # base, reference, a place for the reward model; with stop texts "stop"
    frozen: dict[str, Any]
    tokenizer: Tokenizer
    shape: ModelConfig
    # loads the policy once more, with changed settings, or None
    reload: Callable[..., "Policy"] | None = None

    def initial_params(self) -> Params:
        """`params`, loaded once more if a training step has deleted them. Raises
        UserError if they cannot be.
        """
        if not any(x.is_deleted() for x in jax.tree.leaves(self.params)):
            return self.params
        if self.reload is None:
            raise UserError("the policy was trained and its parameters are gone; load it again")
        return self.reload().params

    def exact_base(self, config: Config) -> Params:
        """The frozen base below adapters as the checkpoint stores it, before it was
        rounded to the compute dtype or to 8 bits.
        """
        exact = config.dtype == "float32" and config.base_dtype == "same"
        if not self.frozen["base"] or exact or self.reload is None:
            return self.frozen["base"]
        return self.reload(dtype="float32", base_dtype="same").frozen["base"]


def make_policy(
    config: C,
    shape: ModelConfig,
    weights: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    reward: Params | None = None,
    mesh: Mesh | None = None,
) -> tuple[C, Policy]:
    """`load.load_policy` with given weights, which have no value head."""
    check_fits(config, shape, tokenizer)
    algorithms.check(config)  # find a wrong name before anything is compiled
    own = stack_layers(dict(weights)) if config.scan_layers else dict(weights)
    model, separate = make_model(config, shape)
    model = missing.without(model, tokenizer.missing(shape.vocab_size))
    # a separate critic starts from the same weights; with adapters it shares them
    weights = {**own, "critic": own} if separate else own
    key = jax.random.key(config.seed)
    known = set(flatten_dict(weights))
    # Only the leaves that the checkpoint lacks (adapters, value head) are computed: the
    # rest is dead code to the compiler.
    new = jax.jit(lambda key: lora.split(model.init(key), lambda path: path not in known)[0])(key)
    on_devices = lambda tree, array: (
        jax.tree.map(array, tree) if mesh is None else sharding.place(tree, mesh)
    )
    still = own  # what is not trained
    if config.base_dtype == "int8":
        if shape.kind != "transformer":
            raise UserError(f"a {shape.kind} policy has no --base-dtype int8: leave it out")
        still = int8.quantise(own)
    if config.lora:
        # The base is never updated, so it is rounded once, here.
        base = policies.cast(on_devices(still, jnp.asarray), model.dtype)
        base = {**base, "critic": base} if separate else base
        params, frozen = new, {"base": base, "reference": None, "reward": {}}
    else:
        # Two copies: `params` is donated to each step, the reference is not.
        reference = on_devices(still, jnp.array)
        params = lora.merge(on_devices(weights, jnp.array), new)
        frozen = {"base": {}, "reference": reference, "reward": {}}
    if config.stop:
        stops = token_bytes.make_stops(config.stop, tokenizer, vocab_size=shape.vocab_size)
        frozen["stop"] = on_devices(stops, jnp.asarray)
    if config.value_loss != "none" and config.value_init != "zero":
        params = init_value(params, jax.random.fold_in(key, 1), config.value_init, reward)
    params = params if mesh is None else sharding.place(params, mesh)
    config = with_token_ids(_as_recorded(config), tokenizer)
    return config, Policy(model, params, frozen, tokenizer, shape)


def _as_recorded(config: C) -> C:
    """The settings with the token ids that the run to resume has recorded, if any."""
    path = Path(config.runs) / config.name / "config.json"
    if not config.resume or not path.exists():
        return config
    stored = read_config(type(config), path)
    return dataclasses.replace(config, eos=stored.eos, start=stored.start)


def with_token_ids(config: C, tokenizer: Tokenizer) -> C:
    """Return the settings with the ids of the tokenizer: the ends of text, padding, and
    what begins each prompt. That is what the tokenizer itself puts before a text; with
    `prompt_start` and a tokenizer that puts nothing, the token that starts a document.

    A run that was made before `start` was recorded keeps what it had: one end of text,
    and no token of the tokenizer's own.
    """
    before = config.eos != -1 and config.start is None
    several = len(tokenizer.eos_ids) > 1 and config.eos != tokenizer.eos_id
    document = () if tokenizer.start_id is None else (tokenizer.start_id,)
    return dataclasses.replace(
        config,
        eos=tokenizer.eos_ids if several else tokenizer.eos_id,
        pad=tokenizer.pad_id,
        start=(not before and tokenizer.start_ids) or document * config.prompt_start,
    )


def own_start(config: RunConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return what the tokenizer itself puts before a text, unless the run has not: what
    reward models read begins with it too.
    """
    return tokenizer.start_ids if config.start == tokenizer.start_ids else ()


def check_fits(config: Config, shape: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError for what JAX would silently clamp or turn into NaN."""
    if config.length > shape.max_length:
        raise UserError(
            f"--prompt-length {config.prompt_length} + --response-length {config.response_length} "
            f"= {config.length} tokens, but the model takes {shape.max_length}; lower one of them"
        )
    largest = max(tokenizer.vocab_size - 1, tokenizer.eos_id, tokenizer.pad_id)
    if largest >= shape.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, but the model's vocabulary has "
            f"{shape.vocab_size}; use its own"
        )


def check_same_tokenizer(option: str, own: Tokenizer, tokenizer: Tokenizer) -> None:
    """Raise UserError if the tokenizers differ."""
    text = "The film: déjà vu, 12 times - or 3.5?\n"
    if own.vocab_size != tokenizer.vocab_size or own.encode(text) != tokenizer.encode(text):
        raise UserError(f"{option} has another tokenizer than the policy; train it on --model's")
