"""Errors of a run, each with the exit code of the command line."""


class RunError(Exception):
    """A run cannot continue. The message is one line: what is wrong, and what to do."""

    code = 1  # a crash: starting again may help


class UserError(RunError):
    """The user has to change something; starting again does not help."""

    code = 2


class Interrupted(RunError):
    """Stopped by a signal after everything was saved: continue with --resume."""

    code = 75  # EX_TEMPFAIL of sysexits.h


class Diverged(RunError):
    """Updates are not finite any more; starting again does not help."""

    code = 76


class PretrainedError(UserError):
    """A checkpoint or its tokenizer cannot be used."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
