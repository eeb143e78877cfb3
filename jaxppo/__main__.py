"""`python -m jaxppo`, the command `jaxppo`."""

import os
import select
import sys

from jaxppo import commands


def main() -> None:
    """Run the command. If the reader of a pipe stops reading (`jaxppo algorithms | head
    -1`), exit quietly.
    """
    try:
        try:
            commands.main()
        finally:
            sys.stdout.flush()  # now, where the error can be caught
    except BrokenPipeError:
        if not reader_gone():  # another pipe
            raise
        # what is flushed when the interpreter ends goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # as after SIGPIPE


def reader_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are always reported
    return bool(poll.poll(0))


if __name__ == "__main__":
    main()
