"""Architectures behind one interface (`types.Model`)."""

from jaxppo.models.transformer import make

__all__ = ["make"]
