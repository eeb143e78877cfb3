"""Architectures behind one interface (`types.Model`)."""

from jaxppo.config import ModelConfig, UserError
from jaxppo.models import recurrent, transformer, windows
from jaxppo.models.critic import init_value, with_critic
from jaxppo.models.stacked import stack, unstack
from jaxppo.types import Model

__all__ = ["KINDS", "init_value", "make", "stack", "unstack", "with_critic"]

KINDS = {
    "transformer": transformer.make,
    "gru": recurrent.make,
    "lstm": recurrent.make,
    "convolution": windows.make,
    "window": windows.make,
}


def make(config: ModelConfig, **options) -> Model:
    """The network of `config.kind` as pure functions; options: dtype, lora, lora_alpha, remat, scan (`transformer.make`).

    Raises UserError for an unknown kind, and for options that a kind does not have.
    """
    if config.kind not in KINDS:
        raise UserError(f"--model-kind {config.kind!r}: choose one of {', '.join(KINDS)}")
    return KINDS[config.kind](config, **options)
