"""The teacher of a run (--teacher): a checkpoint, another run, or the policy itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxppo import policy as policies
from jaxppo import pretrained
from jaxppo.config import RunConfig
from jaxppo.data.prompts import BatchSource, PromptSet
from jaxppo.errors import UserError
from jaxppo.models import make, missing
from jaxppo.models.scan import stack_layers
from jaxppo.models.shapes import ModelConfig
from jaxppo.parallel import sharding
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import files
from jaxppo.run.load import configured_mesh, export_params, restore
from jaxppo.run.policy import Policy, check_fits, check_same_tokenizer
from jaxppo.types import Parts


def with_teacher(
    config: RunConfig, policy: Policy, parts: Parts, prompts: BatchSource
) -> tuple[Policy, Parts]:
    """The policy and the parts with --teacher: its parameters, in the compute dtype,
    are frozen["teacher"]; `self` reads with those of the reference.

    Raises UserError if it has another tokenizer, or its prompts are too long for it.
    """
    name, model, shape, params = config.teacher, policy.model, policy.shape, None
    if name != "self":
        shape, weights, tokenizer = _read_teacher(config)
        check_same_tokenizer(f"--teacher {name}", tokenizer, policy.tokenizer)
        check_fits(config, shape, tokenizer)
        model = make(shape, dtype=config.dtype, scan=config.scan_layers)
        model = missing.without(model, tokenizer.missing(shape.vocab_size))
        own = stack_layers(dict(weights)) if config.scan_layers else dict(weights)
        mesh = configured_mesh(config)
        own = jax.tree.map(jnp.asarray, own) if mesh is None else sharding.place(own, mesh)
        params = policies.cast(own, model.dtype)
    hinted = prompts.extra.get("hint_tokens") if isinstance(prompts, PromptSet) else None
    if hinted is not None and hinted.shape[1] + config.response_length > shape.max_length:
        raise UserError(
            f"--teacher {name} takes {shape.max_length} tokens, but prompts with hints have up to "
            f"{hinted.shape[1]}, and responses {config.response_length}; shorten the hints"
        )
    frozen = {**policy.frozen, "teacher": params}
    return dataclasses.replace(policy, frozen=frozen), parts._replace(teacher=model)


def _read_teacher(config: RunConfig) -> tuple[ModelConfig, Mapping[str, Any], Tokenizer]:
    """Shape, weights and tokenizer of a checkpoint, or of a run at its best step."""
    folder = files.trained_run(config.teacher)
    if folder is None:
        loaded = pretrained.load(config.teacher)
        return loaded.config, loaded.params, loaded.tokenizer
    stored, policy, state = restore(folder, mesh=configured_mesh(config))
    return policy.shape, export_params(stored, policy, state), policy.tokenizer
