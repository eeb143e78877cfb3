"""Architectures behind one interface (`types.Model`)."""

from jaxppo.models.critic import init_value, with_critic
from jaxppo.models.stacked import stack, unstack
from jaxppo.models.transformer import make

__all__ = ["init_value", "make", "stack", "unstack", "with_critic"]
