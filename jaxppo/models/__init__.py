"""Architectures behind one interface (`types.Model`)."""

from jaxppo.config import Config
from jaxppo.errors import UserError
from jaxppo.models import convolution, lora, recurrent, transformer
from jaxppo.models.critic import init_value, with_critic
from jaxppo.models.shapes import ModelConfig
from jaxppo.types import Model

__all__ = ["KINDS", "init_value", "make", "make_model", "with_critic"]

KINDS = {
    "transformer": transformer.make,
    "gru": recurrent.make,
    "lstm": recurrent.make,
    "convolution": convolution.make,
    "window": convolution.make,
}


def make(config: ModelConfig, **options) -> Model:
    """The network of `config.kind`; options and UserErrors as in `transformer.make`."""
    if config.kind not in KINDS:
        raise UserError(f"--model-kind {config.kind!r}: choose one of {', '.join(KINDS)}")
    return KINDS[config.kind](config, **options)


def make_model(config: Config, shape: ModelConfig) -> tuple[Model, bool]:
    """(the configured model, whether it has a separate critic)."""
    model = make(
        shape,
        dtype=config.dtype,
        lora=config.lora,
        lora_alpha=lora.alpha_of(config),
        lora_on=config.lora_on,
        remat=config.remat,
        scan=config.scan_layers,
    )
    separate = config.critic == "separate" and config.value_loss != "none"
    return (with_critic(model, model, width=shape.width) if separate else model), separate
