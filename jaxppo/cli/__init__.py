"""Run a script from the command line: options, one-line errors and exit codes."""

import contextlib
import dataclasses
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

import jax
import tyro

from jaxppo.config import Config, RunConfig, check_numbers, option
from jaxppo.errors import RunError, UserError, first_line
from jaxppo.parallel import processes
from jaxppo.run import option_names, settings, signals


def script(
    main: Callable[[Any], None],
    config: type,
    *,
    args: list[str] | None = None,
    alone: bool = False,
    about: str = "",
    prog: str = "",
) -> None:
    """Parse the options of the dataclass `config`, and call `main(options)`.

    A RunError, or a wrong option, is one line on stderr and an exit code. A run of
    several processes joins the others first.

    Args:
      args: the command line; default: that of this process.
      alone: do not join other processes.
      about: the text above the options in --help; default: the script's docstring.
      prog: the name of the command in --help.
    """
    about = about or sys.modules[main.__module__].__doc__ or ""
    options = parse(config, args=args, description=about, prog=prog)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    trains = isinstance(options, RunConfig) and not alone
    try:
        if trains:
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
        print("stopped" + "; continue with --resume" * trains, file=sys.stderr)
        exit_process(130)
    except Exception as error:
        if problem := device_problem(error):
            print(f"error: {problem}", file=sys.stderr)
            exit_process(UserError.code)
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        exit_process(1)


def device_problem(error: Exception) -> str:
    """Say that an error is JAX's, which has no device, or return ""."""
    if not isinstance(error, RuntimeError | AssertionError):
        return ""
    try:
        jax.devices()  # at once where there are some
    except (RuntimeError, AssertionError) as found:  # JAX asserts that a plugin is there
        asked = os.environ.get("JAX_PLATFORMS", "")
        cause = f"JAX_PLATFORMS is {asked!r}" if asked else first_line(found)
        return f"JAX finds no device ({cause}); set JAX_PLATFORMS=cpu, or see `jaxppo doctor`"
    return ""


def exit_process(code: int) -> NoReturn:
    """Exit. One of several processes does not wait for the others, which may be waiting
    for it: they notice its end.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code) from None


def parse(
    config: type, *, args: list[str] | None = None, description: str = "", prog: str = ""
) -> Any:
    """Parse the options of a dataclass. A wrong one is one line on stderr and exit code
    2.
    """
    given = sys.argv[1:] if args is None else list(args)
    prog = prog or sys.argv[0]
    try:
        file, default = None, {}
        if issubclass(config, Config):
            file, given = split_config_option(given)
            algorithm = chosen_algorithm(given)
            if file is not None or algorithm is not None:
                default["default"], remarks = settings.base_settings(config, file, algorithm)
                for remark in remarks:
                    print(f"note: {remark}", file=sys.stderr)
            if {"-h", "--help", "--help-all"} & {*given}:
                from jaxppo.cli.help import format_help  # slow to import

                shown, every = default.get("default") or config(), "--help-all" in given
                print(format_help(shown, description=description, prog=prog, every=every))
                raise SystemExit(0)
        options = _parse_options(config, given, keep_line_breaks(description), prog, **default)
        # `jaxppo plan` also takes a run's config.json as an argument
        other = file and vars(options).get("config")
        if other:
            raise UserError(f"two files of settings, {other} and --config {file}; give one")
        check_numbers(options)
        check_unread(options)
        return options
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_unread(options: Any) -> None:
    """Raise UserError for a setting that the script would pass over: its class can have
    a dict `UNREAD` of their names and reasons.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name, reason in getattr(type(options), "UNREAD", {}).items():
        if getattr(options, name) != defaults[name]:
            raise UserError(f"{option(name)}: {reason}; leave it out")


def _parse_options(config: type, args: list[str], description: str, prog: str, **default) -> Any:
    """Let tyro parse, and shorten its errors to one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, args=args, description=description, prog=prog, **default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        words = one_line(complaint.getvalue())
        hint = "--help-all" if issubclass(config, Config) else "--help"
        raise UserError(
            _wrong_option(config, words) or f"{words}; {hint} lists all options"
        ) from None


def _wrong_option(config: type, complaint: str) -> str:
    """What the first unknown option in a complaint could mean, or ""."""
    if not (found := re.match(r"Unrecognized options: ([\w.-]+)", complaint)):
        return ""
    names = [field.name for field in dataclasses.fields(config)]
    meant = option_names.suggest(found[1], names, show=as_option)
    return f"no option {found[1]}; {meant}" if meant else ""


def as_option(setting: str) -> str:
    """A setting, or setting=value, as it is typed.

    >>> as_option("group_size"), as_option("loss=dual_clip")
    ('--group-size', '--loss dual_clip')
    >>> as_option("loss_settings=ceiling:DELTA")
    '--loss-settings ceiling DELTA'
    """
    name, equals, value = setting.partition("=")
    return option(name) + f" {value.replace(':', ' ')}" * bool(equals)


def keep_line_breaks(description: str) -> str:
    """Indent paragraphs of labelled lines by a space, so that the help does not join
    their lines.

    >>> keep_line_breaks(
    ...     "One.\\nTwo.\\n\\nQuestion   Why?\\nMethod     So.\\n           And so."
    ... )
    'One.\\nTwo.\\n\\n Question   Why?\\n Method     So.\\n            And so.'
    """
    paragraphs = description.split("\n\n")
    labelled = [re.search(r"^[A-Z]\w*(?: \w+)? {2,}\S", text, re.MULTILINE) for text in paragraphs]
    return "\n\n".join(
        textwrap.indent(text, " ") if found else text
        for text, found in zip(paragraphs, labelled, strict=True)
    )


def split_config_option(args: list[str]) -> tuple[Path | None, list[str]]:
    """The file of --config, and the other arguments. Raises UserError if there are
    several files, or none after --config.

    >>> split_config_option(["--steps", "3", "--config", "a.yaml"])
    (PosixPath('a.yaml'), ['--steps', '3'])
    >>> split_config_option(["--config=b.json"]), split_config_option([])
    ((PosixPath('b.json'), []), (None, []))
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
        raise UserError(f"--config is given {len(found)} times; give one file")
    if found and (not found[0] or found[0].startswith("--")):
        raise UserError("--config needs a file: --config settings.yaml")
    return Path(found[0]) if found else None, rest


def chosen_algorithm(args: list[str]) -> str | None:
    """The last value of --algorithm among the arguments.

    >>> chosen_algorithm(["--steps", "3", "--algorithm", "grpo"])
    'grpo'
    >>> chosen_algorithm(["--algorithm=rloo"]), chosen_algorithm([])
    ('rloo', None)
    """
    found = None
    for word, following in zip(args, [*args, None][1:], strict=True):
        if word == "--algorithm":
            found = following
        elif word.startswith("--algorithm="):
            found = word.split("=", 1)[1]
    return found


def one_line(box: str) -> str:
    """The complaint in an error box of tyro's, and the options that it suggests.

    >>> one_line(
    ...     "╭─ Wrong ─╮\\n│ No such: --stepz │\\n│ ── │\\n│ Perhaps you meant: │\\n"
    ...     "│     --steps INT │\\n╰──╯"
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
    if "│" not in box:  # a terminal without box characters: the title is a section
        sections = sections[1:] or [[]]
    suggested = [
        text
        for title, *texts in filter(None, sections)
        if title == "Perhaps you meant:"
        for text in texts
        if text.startswith("--")
    ]
    hint = f"; perhaps you meant: {', '.join(suggested)}" if suggested else ""
    return " ".join(sections[0]) + hint
