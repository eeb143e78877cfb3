"""The command `jaxppo`, and the frame around every script: options, one-line errors,
exit codes. No JAX before it is needed.
"""

import contextlib
import io
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import tyro

from jaxppo.config import Config, RunConfig
from jaxppo.errors import RunError, UserError
from jaxppo.parallel import processes
from jaxppo.run import settings, signals


def script(
    main: Callable[[Any], None],
    config: type,
    *,
    args: list[str] | None = None,
    alone: bool = False,
    about: str = "",
    prog: str = "",
) -> None:
    """Run `main(options)` with the options of the dataclass `config` from the command
    line; `about` stands above them in --help, or else what the script says of itself,
    and `prog` is what is run.

    A RunError is one line on stderr and its exit code; a wrong option is one, too. A
    run joins its other processes first, if there are any, unless it is to be `alone`.
    """
    options = parse(
        config,
        args=args,
        description=about or sys.modules[main.__module__].__doc__ or "",
        prog=prog,
    )
    # The compiler's remarks about the machine are no news to the user.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if isinstance(options, RunConfig) and not alone:
            processes.connect(
                options.distributed, timeout=options.connect_timeout, heartbeat=options.heartbeat
            )
            signals.exit_on_sigterm()
        main(options)
    except RunError as error:
        if getattr(options, "traceback", False):
            raise
        print(f"error: {error}", file=sys.stderr)
        exit_process(error.code)
    except KeyboardInterrupt:
        print(
            "stopped; continue with --resume"
            if isinstance(options, RunConfig) and not alone
            else "stopped",
            file=sys.stderr,
        )
        exit_process(130)
    except Exception:
        if not several_processes():
            raise
        traceback.print_exc()
        exit_process(1)


def several_processes() -> bool:
    """Whether this process has joined others."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def exit_process(code: int) -> NoReturn:
    """Exit. One process of several does not wait for the others, which may be waiting
    for it: they see its end, and end.
    """
    if several_processes():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code) from None


ABOUT_FILES = (
    "--config FILE takes settings from a file, `name: value` a line (YAML), or from a run's config.json; options on the command "
    "line override it."
)


def parse(
    config: type, *, args: list[str] | None = None, description: str = "", prog: str = ""
) -> Any:
    """The options of a dataclass from the command line; for a wrong one, one line on
    stderr and exit code 2. `prog` is what is run, in the help.
    """
    complaint = io.StringIO()
    given = sys.argv[1:] if args is None else list(args)
    try:
        file, default = None, {}
        if issubclass(config, Config):
            file, given = split_config_option(given)
            description = f"{description.rstrip()}\n\n{ABOUT_FILES}"
            # What stands in a file and the algorithm's settings come first, as
            # defaults: any option overrides one of them.
            if file is not None or chosen_algorithm(given) is not None:
                default["default"], remarks = settings.base_settings(
                    config, file, chosen_algorithm(given)
                )
                for remark in remarks:
                    print(f"note: {remark}", file=sys.stderr)
        with contextlib.redirect_stderr(complaint):
            options = tyro.cli(
                config,
                args=given,
                description=keep_line_breaks(description),
                prog=prog or None,
                **default,
            )
        beside = file and vars(options).get(
            "config"
        )  # `jaxppo plan` takes a run's record in another way, too
        if beside:
            raise UserError(f"two files of settings, {beside} and --config {file}; give one")
        return options
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code:
            print(
                f"error: {one_line(complaint.getvalue())}; --help lists all options",
                file=sys.stderr,
            )
        raise


def keep_line_breaks(description: str) -> str:
    """Paragraphs of labelled lines, set in by a space: the help joins lines that begin
    with a letter.

    >>> as_written("One.\\nTwo.\\n\\nQuestion   Why?\\nMethod     So.\\n           And so.")
    'One.\\nTwo.\\n\\n Question   Why?\\n Method     So.\\n            And so.'
    """
    paragraphs = description.split("\n\n")
    labelled = [re.search(r"^[A-Z]\w*(?: \w+)? {2,}\S", text, re.MULTILINE) for text in paragraphs]
    return "\n\n".join(
        textwrap.indent(text, " ") if found else text
        for text, found in zip(paragraphs, labelled, strict=True)
    )


def split_config_option(args: list[str]) -> tuple[Path | None, list[str]]:
    """The value of --config among the arguments, and the others. Raises UserError when
    it has none, or several.

    >>> (
    ...     config_file(["--steps", "3", "--config", "a.yaml"]),
    ...     config_file(["--config=b.json"]),
    ...     config_file([]),
    ... )
    ((PosixPath('a.yaml'), ['--steps', '3']), (PosixPath('b.json'), []), (None, []))
    """
    found, rest, words = [], [], iter(args)
    for word in words:
        if word == "--config":
            found.append(next(words, ""))
        elif word.startswith("--config="):
            found.append(word.split("=", 1)[1])
        else:
            rest.append(word)
    if len(found) > 1:
        raise UserError(f"--config stands there {len(found)} times; give one file")
    if found and (not found[0] or found[0].startswith("--")):
        raise UserError("--config needs a file: --config settings.yaml")
    return Path(found[0]) if found else None, rest


def chosen_algorithm(args: list[str]) -> str | None:
    """The value of --algorithm among the arguments, the last one if there are several.

    >>> (
    ...     chosen_algorithm(["--steps", "3", "--algorithm", "grpo"]),
    ...     chosen_algorithm(["--algorithm=rloo"]),
    ...     chosen_algorithm([]),
    ... )
    ('grpo', 'rloo', None)
    """
    found = None
    for word, following in zip(args, [*args, None][1:], strict=True):
        if word == "--algorithm":
            found = following
        elif word.startswith("--algorithm="):
            found = word.split("=", 1)[1]
    return found


def one_line(box: str) -> str:
    """What a box of tyro's says: its complaint, and the options that it thinks were
    meant.

    >>> one_line(
    ...     "╭─ Wrong ──╮\\n│ No such: --stepz │\\n│ ──── │\\n│ Perhaps you meant: │\\n│     --steps INT │\\n╰──╯"
    ... )
    'No such: --stepz; perhaps you meant: --steps INT'
    >>> one_line(" Wrong\\n -----\\n  No such: --stepz\\n  ----\\n")
    'No such: --stepz'
    """
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│ ")
        if text and set(text) <= set("─-"):
            sections.append([])
        elif text and line[0] not in "╭╰":
            sections[-1].append(text)
    if (
        "│" not in box
    ):  # a terminal without box characters: the title stands in a section of its own
        sections = sections[1:] or [[]]
    meant = [
        text
        for section in sections
        if section[:1] == ["Perhaps you meant:"]
        for text in section
        if text.startswith("--")
    ]
    return " ".join(sections[0]) + (f"; perhaps you meant: {', '.join(meant)}" if meant else "")
