"""`python -m jaxppo`, which is the command `jaxppo`."""

import os
import select
import sys

from jaxppo import commands


def main() -> None:
    """The command. Who reads what it prints may stop reading (`jaxppo algorithms | head
    -1`): that is no error to show.
    """
    try:
        try:
            commands.main()
        finally:
            sys.stdout.flush()  # here, and not when the interpreter ends
    except BrokenPipeError:
        if not reader_gone():  # another pipe
            raise
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # for what is flushed at the end
        raise SystemExit(141) from None  # as of a program that the signal ends


def reader_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are told unasked
    return bool(poll.poll(0))


if __name__ == "__main__":
    main()
