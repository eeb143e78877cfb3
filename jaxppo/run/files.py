"""The folder of a run: find it, and write its settings, commands and results.

A run's folder is `<runs>/<name>/` with config.json, command.txt, metrics.jsonl,
samples.jsonl and curves.png.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxppo import __version__
from jaxppo.config import HIDDEN, RunConfig
from jaxppo.errors import UserError
from jaxppo.parallel import processes
from jaxppo.run.settings import to_dict

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# settings whose value is hidden
SECRET = re.compile(r"(?i)(^|_)(token|key|secret|password)$")
CREDENTIALS = re.compile(r"//[^/@\s]+@")  # in a URL
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check_name(name: str) -> None:
    """Raise UserError for a name that could lead out of the folder of runs."""
    if not NAME.fullmatch(name) or name.strip(".") == "":
        raise UserError(f"--name {name!r}: use 1 to 64 letters, digits, '.', '_' or '-'")


def check_new(root: str | Path, name: str, *, resume: bool, mark: str = "config.json") -> Path:
    """The folder of a run. Raises UserError if it holds `mark` ("" is the folder
    itself), by which a run has begun, and is not resumed.
    """
    check_name(name)
    folder = Path(root) / name
    # of several processes, the first may have begun it just now
    if processes.is_main() and (folder / mark).exists() and not resume:
        raise UserError(f"{folder} exists: choose another --name, or continue it with --resume")
    return folder


def run_folder(root: str | Path, name: str, *, resume: bool) -> Path:
    """Create the folder of a new run, or find that of a run to resume, and print which.
    A run to resume that has not begun is a new one.

    Raises UserError if a run of this name has begun and is not resumed.
    """
    folder = check_new(root, name, resume=resume)
    if not processes.is_main():
        return folder
    started = (folder / "config.json").exists()
    make_folder(folder)
    print(f"{'resuming' if started else 'new run:'} {folder}")
    return folder


def make_folder(folder: Path) -> None:
    """Create a folder. Raises UserError if it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); choose another --runs folder"
        ) from error


def free_name(root: str | Path, name: str) -> str:
    """The name, or with the first free number if there is a folder of that name:
    name-2, name-3, ...
    """
    check_name(name)
    number = 1
    while processes.is_main() and (Path(root) / _numbered(name, number)).exists():
        number += 1
    return _numbered(name, processes.broadcast_int(number))


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def has_started(folder: Path) -> bool:
    """Whether the folder holds a run, as process 0 sees it: it may be writing there
    already.
    """
    return bool(processes.broadcast_int(int((folder / "config.json").exists())))


def find_run(folder: Path) -> Path:
    """The folder that holds a run's config.json: `folder`, or its `policy` stage.
    Raises UserError if there is none.
    """
    for place in (folder, folder / "policy"):
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"no run in {folder}; give the folder that holds its config.json, or that of a task's run"
    )


def trained_run(name: str) -> Path | None:
    """The folder of the run that has checkpoints: the one of this name, or its `policy`
    stage; None for anything else, such as a checkpoint of weights.
    """
    folder = Path(name).expanduser()
    places = (place for place in (folder, folder / "policy") if (place / "checkpoints").is_dir())
    return next(places, None)


def write_config(folder: Path, config: dict) -> None:
    """Write config.json atomically, without secrets."""
    write_atomically(folder / "config.json", json.dumps(hide_secrets(config), indent=2) + "\n")


def hide_secrets(config: dict) -> dict:
    """Replace the text of settings that are named like secrets."""
    return {
        name: HIDDEN if SECRET.search(name) and isinstance(x, str) and x else x
        for name, x in config.items()
    }


def write_command(folder: Path) -> None:
    """Append the command of this process to command.txt; a notebook has none."""
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) is None:
        return
    module = main.__spec__.name.removesuffix(".__main__") if main.__spec__ else ""
    path = folder / "command.txt"
    before = path.read_text("utf-8", errors="replace") if path.exists() else ""
    write_atomically(path, before + command_line(sys.argv, module=module) + "\n")


def command_line(words: Sequence[str], *, module: str = "") -> str:
    """The command to type again: without secrets, and without the path of the program.

    >>> command_line(["experiments/sft.py", "--hub-token", "abc", "--data", "my file"])
    "python experiments/sft.py --hub-token '***' --data 'my file'"
    >>> command_line(["/home/me/jaxppo", "plan", "--key=abc", "https://me:abc@x.org"])
    "jaxppo plan '--key=***' 'https://***@x.org'"
    """
    program = ["python", words[0]] if words[0].endswith(".py") else [Path(words[0]).name]
    shown, hide_next = ["python", "-m", module] if module else program, False
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        option = name.removeprefix("--").replace("-", "_")
        secret = word.startswith("--") and SECRET.search(option) is not None
        if hide_next:
            shown.append(HIDDEN)
        elif secret and equals:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(CREDENTIALS.sub(rf"//{HIDDEN}@", word))
        hide_next = secret and not equals
    return printable(shlex.join(shown))


def portable_settings(config: RunConfig) -> dict[str, Any]:
    """The settings without the paths of this machine, for a record."""
    return {name: x for name, x in to_dict(config).items() if name not in ("runs", "results")}


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is complete or absent, whenever the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_record(folder: str, name: str, record: dict[str, Any]) -> Path | None:
    """Write <folder>/<name>.json atomically and return its path; do nothing without a
    folder. Non-finite numbers become null.
    """
    if not folder:
        return None
    place = Path(folder) / f"{name}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(json_safe(record), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(place, text + "\n")
    return place


def json_safe(x: Any) -> Any:
    """Replace non-finite numbers, which JSON cannot hold, by None.

    >>> json_safe({"a": [1.0, float("nan")], "b": (float("inf"), "c")})
    {'a': [1.0, None], 'b': [None, 'c']}
    """
    if isinstance(x, dict):
        return {key: json_safe(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [json_safe(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_result(
    folder: Path, config: RunConfig, result: dict[str, Any], *, results: str, kind: str, **more: Any
) -> None:
    """Write the result of a run: <folder>/result.json, and with `results` also
    <results>/<kind>/<name>.json, which adds settings, minutes, versions and `more`. Of
    several processes the first writes.
    """
    if not processes.is_main():
        return
    write_record(str(folder), "result", result)
    record = {
        "config": portable_settings(config),
        "result": result,
        "minutes": training_minutes(folder),
        "versions": versions(),
    }
    write_record(results, f"{kind}/{config.name}", record | more)


def training_minutes(run: Path) -> float:
    """Minutes of a run's steps, compilation included."""
    return round(sum(row["seconds"] for row in read_metrics(run)) / 60, 2)


def versions() -> dict[str, str]:
    """Versions of Python, jaxppo and its main packages; `git` is the `commit`."""
    root = Path(__file__).parents[2]
    own = {"jaxppo": __version__, "git": commit(root), "python": sys.version.split()[0]}
    return own | {name: metadata.version(name) for name in PACKAGES}


@cache
def commit(root: Path) -> str:
    """The commit of a checkout, with "+changed" if Python files differ from it; "" if
    there is none. The first answer counts: a checkout may move on while its code runs.
    """
    if not (root / ".git").exists():
        return ""
    git = lambda *words: subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
    )
    try:
        found = git("rev-parse", "HEAD").stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found + "+changed" * (found != "" and changed)


def read_jsonl(path: Path) -> list[dict]:
    """Read the records of a .jsonl file, up to a half-written line; [] if there is no
    file.
    """
    rows = []
    # not splitlines: a text may hold other line separators
    for line in path.read_text("utf-8").split("\n") if path.exists() else []:
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read a run's metrics.jsonl: a row a step. null is NaN."""
    return read_numbers(folder / "metrics.jsonl")


def read_numbers(path: Path) -> list[dict[str, Any]]:
    """Read the records of a .jsonl file, as `read_jsonl` does; null is NaN."""
    number = lambda x: math.nan if x is None else x
    return [{name: number(x) for name, x in row.items()} for row in read_jsonl(path)]


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Write records as lines of JSON, atomically."""
    write_atomically(path, "".join(map(json_line, rows)))


def json_line(row: dict) -> str:
    """A record as a line of JSON; non-finite numbers become null."""
    return json.dumps(json_safe(row), ensure_ascii=False, allow_nan=False) + "\n"


def printable(text: str) -> str:
    r"""Escape control characters; line ends and tabs become spaces.

    >>> printable("a\x1b[31mb\nc")
    'a\\x1b[31mb c'
    """
    text = text.replace("\n", " ").replace("\t", " ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Escape control characters, but keep line ends."""
    return "\n".join(map(printable, text.split("\n")))
