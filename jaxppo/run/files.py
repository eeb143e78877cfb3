"""What a run leaves on disk and on the screen: `runs/<name>/` with config.json,
command.txt, metrics.jsonl, samples.jsonl, curves.png.
"""

import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxppo import __version__
from jaxppo.config import HIDDEN, RunConfig
from jaxppo.errors import UserError
from jaxppo.parallel import processes
from jaxppo.run.settings import to_dict

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
SECRET = re.compile(
    r"(?i)(^|_)(token|key|secret|password)$"
)  # names of settings whose text is nobody's business
CREDENTIALS = re.compile(r"//[^/@\s]+@")  # of an address


def check_name(name: str) -> None:
    """Raise UserError for a name that could lead out of the folder of runs."""
    if not NAME.fullmatch(name) or name.strip(".") == "":
        raise UserError(f"--name {name!r}: use 1 to 64 letters, digits, '.', '_' or '-'")


def run_folder(root: str | Path, name: str, *, resume: bool) -> Path:
    """The folder of a run: made new, or found again when resuming. Raises UserError
    when that is not what is there.
    """
    check_name(name)
    folder = Path(root) / name
    if not processes.is_main():  # process 0 has looked, or will
        return folder
    started = (folder / "config.json").exists()
    if started and not resume:
        raise UserError(f"{folder} exists: choose another --name, or continue it with --resume")
    if not started and resume:
        raise UserError(f"nothing to resume in {folder}; start it without --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); choose another --runs folder"
        ) from error
    return folder


def has_started(folder: Path) -> bool:
    """Whether there is a run in a folder; of several processes as the first one sees
    it, which may write there meanwhile.
    """
    return bool(processes.from_main(int((folder / "config.json").exists())))


def find_run(folder: Path) -> Path:
    """Where a run's config.json lies: the folder, or `policy` in that of a task's whole
    way. Raises UserError without one.
    """
    found = next(
        (place for place in (folder, folder / "policy") if (place / "config.json").is_file()), None
    )
    if found is None:
        raise UserError(
            f"no run in {folder}; give the folder that holds its config.json, or that of a task's whole way"
        )
    return found


def write_config(folder: Path, config: dict) -> None:
    """config.json, whole or not at all; what looks like a secret is left out."""
    write_whole(folder / "config.json", json.dumps(shown(config), indent=2) + "\n")


def shown(config: dict) -> dict:
    """Settings for others' eyes: what looks like a secret is hidden."""
    return {
        name: HIDDEN if SECRET.search(name) and isinstance(x, str) and x else x
        for name, x in config.items()
    }


def write_command(folder: Path) -> None:
    """One line more in command.txt: how this process was started. None in a notebook,
    where nobody typed a command.
    """
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) is None:
        return
    module = main.__spec__.name.removesuffix(".__main__") if main.__spec__ else ""
    path = folder / "command.txt"
    before = path.read_text("utf-8", errors="replace") if path.exists() else ""
    write_whole(path, before + command_line(sys.argv, module=module) + "\n")


def command_line(words: Sequence[str], *, module: str = "") -> str:
    """A command as it was typed, to be typed again: without secrets, and without the
    place where a program was found.

    >>> command_line(
    ...     ["experiments/sft.py", "--hub-token", "abc", "--data", "my pairs.jsonl"]
    ... )
    "python experiments/sft.py --hub-token '***' --data 'my pairs.jsonl'"
    >>> command_line(
    ...     [
    ...         "/home/me/venv/bin/jaxppo",
    ...         "plan",
    ...         "--api-key=abc",
    ...         "--model",
    ...         "https://me:abc@example.org/x",
    ...     ]
    ... )
    "jaxppo plan '--api-key=***' --model 'https://***@example.org/x'"
    """
    program = ["python", words[0]] if words[0].endswith(".py") else [Path(words[0]).name]
    shown, secret = ["python", "-m", module] if module else program, False
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        hides = (
            word.startswith("--")
            and SECRET.search(name.removeprefix("--").replace("-", "_")) is not None
        )
        word = (
            HIDDEN
            if secret
            else f"{name}={HIDDEN}"
            if hides and equals
            else CREDENTIALS.sub(rf"//{HIDDEN}@", word)
        )
        shown.append(word)
        secret = hides and not equals
    return printable(shlex.join(shown))


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings as a record keeps them, without the places of one machine."""
    return {name: x for name, x in to_dict(config).items() if name not in ("runs", "results")}


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all, whenever the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def keep_record(folder: str, name: str, record: dict[str, Any]) -> Path | None:
    """Write <folder>/<name>.json, whole or not at all, and say where; nothing where no
    folder is named. A number that is not finite is null there, as JSON has it.
    """
    if not folder:
        return None
    place = Path(folder) / f"{name}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(
        place, json.dumps(finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return place


def finite(x: Any) -> Any:
    """What JSON can hold: None in place of numbers that are not finite.

    >>> finite({"a": [1.0, float("nan")], "b": (float("inf"), "c")})
    {'a': [1.0, None], 'b': [None, 'c']}
    """
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def keep_result(
    folder: Path, config: RunConfig, result: dict[str, Any], *, results: str, kind: str, **more: Any
) -> None:
    """Write what a run has found: <folder>/result.json; and where `results` names a
    folder, <results>/<kind>/<name>.json, which has its settings, the minutes of its
    steps, the versions, and `more` besides. Of several processes the first writes.
    """
    if not processes.is_main():
        return
    keep_record(str(folder), "result", result)
    record = {
        "config": settings_of(config),
        "result": result,
        "minutes": minutes(folder),
        "versions": versions(),
    }
    keep_record(results, f"{kind}/{config.name}", record | more)


def minutes(run: Path) -> float:
    """Minutes of a run's steps, compilation included."""
    return round(sum(row["seconds"] for row in read_lines(run / "metrics.jsonl")) / 60, 2)


def versions() -> dict[str, str]:
    """Of this code (its git commit, where it is a checkout; "+changed" where Python
    files are not as committed) and of what it stands on.
    """
    found = {
        name: metadata.version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    }
    here = Path(__file__).parent
    commit = ""
    if (here.parent / ".git").exists():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            git = lambda *words: subprocess.run(
                ["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=10
            )
            commit = git("rev-parse", "HEAD").stdout.strip()
            commit += "+changed" * (
                commit != "" and git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1
            )
    return {"jaxppo": __version__, "git": commit, "python": sys.version.split()[0], **found}


def read_lines(path: Path) -> list[dict]:
    """Records of a .jsonl file; a half-written last line is left out."""
    rows = []
    for line in (
        path.read_text("utf-8").split("\n") if path.exists() else []
    ):  # a text may hold other ends of lines
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def printable(text: str) -> str:
    """The text with control characters written out.

    >>> printable("a\\x1b[31mb\\nc")
    'a\\\\x1b[31mb c'
    """
    text = text.replace("\n", " ").replace("\t", " ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
