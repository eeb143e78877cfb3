"""The error of this package, where all its modules can import it."""

from jaxppo.config import UserError


class PretrainedError(UserError):
    """A checkpoint or its tokenizer cannot be used as it is."""
