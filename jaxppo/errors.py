"""Errors of a run, each with the exit code of the command line."""


class RunError(Exception):
    """Why a run cannot go on: one line that says what is wrong and what to do. The
    command line exits with `code`.
    """

    code = 1  # a crash: starting again may help


class UserError(RunError):
    """Something the user can mend; starting again does not help."""

    code = 2


class Interrupted(RunError):
    """Stopped by a signal, with everything saved: start again with --resume."""

    code = 75  # EX_TEMPFAIL of sysexits.h


class Diverged(RunError):
    """The numbers are not finite any more; starting again does not help."""

    code = 76


class PretrainedError(UserError):
    """A checkpoint or its tokenizer cannot be used as it is."""
