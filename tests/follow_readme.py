"""Run the lines of the shell blocks of README.md and docs/, in order, in a fresh clone with an
empty home folder.

    python tests/follow_readme.py [--list] [--keep FOLDER] [--skip TEXT ...] [--record]

Blocks that need a cloud, marked `sh cloud`, are left out and listed. Files that a page shows,
marked with their name (`python mine.py`), are written into the clone. The output of each line goes
to FOLDER/followed/NN.txt and its result to FOLDER/followed.json. With --keep, a later call updates
the clone and skips lines that have succeeded. The exit code is 1 if a line failed. It takes an hour
or more. `--record` writes the results to tests/followed.json; a test fails if a page has a line
that is not in there.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "followed.json"
# In the order in which a reader follows them.
PAGES = (
    "README.md", "docs/quickstart.md", "docs/your_task.md", "docs/running.md",
    "docs/supervised.md", "docs/tasks.md", "docs/ablations.md", "docs/devices.md", "docs/cloud.md",
)  # fmt: skip
SHELL = ("sh", "bash", "shell", "console")
# Starts of an indented block that is a shell block.
COMMANDS = ("python", "pip", "jaxppo", ".venv/bin/", "gcloud", "bash", "git")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    info: str  # the rest of its first line: a file's name, or `cloud`
    text: str


def fenced_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    pattern = r"^ *```(\w*) *([^\n]*)\n(.*?)^ *```"
    return [Block(*x) for x in re.findall(pattern, text, re.MULTILINE | re.DOTALL)]


def shell_blocks(text: str, *, cloud: bool | None = None) -> list[str]:
    """Return fenced blocks in a shell's language, and indented ones that begin with a command.

    cloud: only blocks that need a cloud or a hub, or only others; default: all.
    """
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^|\n\n)((?: {4}[^\n]*\n?)+)", rest)
    found = [
        re.sub(r"^\$ ", "", block.text, flags=re.MULTILINE)
        for block in fenced_blocks(text)
        if block.language in SHELL and cloud in (None, "cloud" in block.info.split())
    ]
    return found + [block for block in indented if block.strip().startswith(COMMANDS)]


def commands(text: str, *, cloud: bool | None = None) -> list[str]:
    """Return the lines of the shell blocks, without comments, each once."""
    lines = [
        re.sub(r"\s+# .*", "", line).strip()
        for block in shell_blocks(text, cloud=cloud)
        for line in block.splitlines()
    ]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def read_pages() -> str:
    """Return the text of all pages."""
    return "\n\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)


def shown_files(text: str) -> dict[str, str]:
    """Return the files that a page shows: name -> content."""
    named = {x.info: x.text for x in fenced_blocks(text) if x.language not in SHELL}
    return {name: content for name, content in named.items() if re.fullmatch(r"\w+\.\w+", name)}


def clean_environment(home: Path) -> dict[str, str]:
    """Return a new user's environment: without this one's Python, caches and settings of JAX."""
    kept = {
        name: x
        for name, x in os.environ.items()
        if not name.startswith(("JAX", "XLA", "PYTHON", "VIRTUAL_ENV", "PYTEST"))
    }
    path = [
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not (Path(folder).parent / "pyvenv.cfg").exists()
    ]
    return {
        **kept,
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "PATH": os.pathsep.join(path),
    }


def output_of(folder: Path, *command: str) -> str:
    """Return the output of a command."""
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def date_and_commit(clone: Path) -> dict[str, str]:
    """Return the date of today and the clone's commit."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": output_of(clone, "git", "rev-parse", "--short", "HEAD"),
    }


def follow(lines: list[str], clone: Path, home: Path, out: Path) -> list[dict]:
    """Run the lines in a clone, except those that succeeded before; return their results."""
    record = out / "followed.json"
    before = {row["line"]: row for row in json.loads(record.read_text())} if record.exists() else {}
    (out / "followed").mkdir(exist_ok=True)
    found: list[dict] = []
    for number, line in enumerate(lines):
        row = before.get(line, {})
        if row.get("exit") != 0:
            started = time.monotonic()
            with (out / "followed" / f"{number:02}.txt").open("w") as said:
                done = subprocess.run(
                    ["bash", "-c", line],
                    cwd=clone,
                    env=clean_environment(home),
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            row = {
                "line": line,
                "exit": done.returncode,
                "seconds": round(time.monotonic() - started),
                **date_and_commit(clone),
            }
        found.append(row)
        print(f"{row['exit']:3} {row['seconds']:6} s  {line}", flush=True)
        later = [before[line] for line in lines[number + 1 :] if line in before]
        record.write_text(json.dumps(found + later, indent=1) + "\n")
    return found


def record_of(found: list[dict], left_out: list[str], clone: Path) -> dict:
    """Return the record: the results, with versions and number of cores."""
    versions = "import jax, platform; print(platform.python_version(), jax.__version__)"
    python, jax = output_of(clone, ".venv/bin/python", "-c", versions).split()
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": python,
        "jax": jax,
        "lines": found,
        "left out, since they need the cloud": left_out,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the lines and run none")
    parser.add_argument(
        "--keep", type=Path, help="work in this folder, keep it, and continue there"
    )
    parser.add_argument(
        "--skip", nargs="*", default=[], help="skip lines that contain one of these texts"
    )
    parser.add_argument(
        "--record", action="store_true", help="write the results to tests/followed.json"
    )
    options = parser.parse_args()
    if options.record and options.skip:
        parser.error("a record has all lines: use --record without --skip")
    pages = read_pages()
    lines = commands(pages, cloud=False)
    skipped = [line for line in lines if any(text in line for text in options.skip)]
    left_out = [*skipped, *commands(pages, cloud=True)]
    lines = [line for line in lines if line not in left_out]
    print("".join(f"left out: {line}\n" for line in left_out), end="", flush=True)
    if options.list:
        print("\n".join(lines))
        return 0
    out = options.keep or Path(tempfile.mkdtemp())
    clone, home = out / "jaxppo", out / "home"
    home.mkdir(parents=True, exist_ok=True)
    if clone.exists():
        subprocess.run(["git", "pull", "--quiet", "--ff-only"], cwd=clone, check=True)
    else:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for name, content in shown_files(pages).items():
        (clone / name).write_text(content)
    try:
        found = follow(lines, clone, home, out)
        if options.record:
            RECORD.write_text(json.dumps(record_of(found, left_out, clone), indent=1) + "\n")
    finally:
        if not options.keep:
            shutil.rmtree(out)
    failed = [row["line"] for row in found if row["exit"]]
    print(f"{len(found) - len(failed)} of {len(found)} lines succeeded")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
