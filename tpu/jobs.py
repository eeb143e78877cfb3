"""The job: a script of the repository with its options, and the checks before anything costs."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerators import Accelerator
from basics import ROOT, Stop, find_secrets, tracked_files
from gcloud_errors import last_line
from slices import Slice

sys.path.append(str(ROOT))  # jaxppo may not be installed; this part of it needs no package
from jaxppo.data import textfile
from jaxppo.errors import UserError

NAME = r"(?=.*[^.])[A-Za-z0-9._-]{1,64}"  # of a run, and of its folder
AGENT_KEY = "~/.ssh/google_compute_engine"  # gcloud's key
BUCKET = r"gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._-]+)*/?"


@dataclass(frozen=True)
class Job:
    """A script of the repository with its options."""

    script: str
    options: tuple[str, ...]
    name: str  # of the run, the same after every restart
    runs: str  # the folder of runs

    @property
    def bucket(self) -> str:
        return self.runs.split("/")[2] if self.runs.startswith("gs://") else ""

    def command(self, kind: Accelerator) -> list[str]:
        """Return the command of every host. job.sh adds --resume if the run has started before."""
        words = ["python", self.script, *self.options]
        own = {"--name": self.name, "--runs": self.runs, "--expect-devices": str(kind.chips)}
        # The hosts of a large slice may be ready half an hour apart.
        own |= {"--distributed": "on", "--connect-timeout": "1800"} if kind.hosts > 1 else {}
        for option, value in own.items():
            words += [] if option_value(option, self.options) else [option, value]
        return words


def option_value(option: str, words: Sequence[str]) -> str:
    """Return the last value given to an option, or an empty text.

    >>> (
    ...     option_value("--runs", ["--steps", "3", "--runs=a", "--runs", "b"]),
    ...     option_value("--name", ["--names", "x"]),
    ... )
    ('b', '')
    """
    found = ""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == option:
            found = following
        elif word.startswith(option + "="):
            found = word.split("=", 1)[1]
    return found


def parse_job(words: list[str], slice_name: str, kind: Accelerator) -> Job:
    """Return the job after --. Raises Stop."""
    if not words:
        raise Stop("no job; give it after --, for example: -- experiments/sentiment.py --steps 100")
    script, options, files = words[0], tuple(words[1:]), tracked_files()
    if script not in files:
        raise Stop(
            f"{script} is not a tracked file of {ROOT}, and only those are copied: "
            "write its path from there, git add it"
        )
    check_options(options, files)
    stored = stored_names(option_value("--config", options), files)
    name = option_value("--name", options) or stored.get("name", "") or slice_name
    runs = option_value("--runs", options) or stored.get("runs", "") or "runs"
    if not re.fullmatch(NAME, name):
        raise Stop(f"--name {name!r}: use 1 to 64 letters, digits, '.', '_' or '-'")
    if runs.startswith("gs:") and not re.fullmatch(BUCKET, runs):
        raise Stop(f"--runs {runs!r}: write gs://BUCKET/FOLDER")
    job = Job(script, options, name, runs)
    if kind.hosts > 1 and not job.bucket:
        raise Stop(
            f"{kind.type} has {kind.hosts} hosts, each with its own disk: "
            f"give the job --runs gs://BUCKET/FOLDER, not {runs}"
        )
    return job


def check_options(options: Sequence[str], files: Sequence[str]) -> None:
    """Raise Stop for options with a secret, or with a file that is not copied to the slice."""
    if found := find_secrets(options):
        raise Stop(
            f"{found[0]}: all users of a machine can read its command lines; "
            "put it into a file, and pass --env-file"
        )
    before = ""
    for word in options:
        name, _, after = word.partition("=")
        option, value = (name, after) if word.startswith("--") else (before, word)
        before = name if word.startswith("--") and not after else ""
        if (
            option == "--runs"
            or not ("/" in value or Path(value).suffix)
            or not (ROOT / value).exists()
        ):
            continue
        place = (ROOT / value).resolve()
        inside = place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else ""
        if not inside or not any(file == inside or file.startswith(f"{inside}/") for file in files):
            raise Stop(
                f"{option} {value}: it exists here, but would not on the slice, "
                "which gets tracked files only: git add it"
            )


def stored_names(file: str, files: Sequence[str]) -> dict[str, str]:
    """Return `name` and `runs` from a settings file, if it has them. Raises Stop.

    jaxppo reads and checks the rest.
    """
    if not file:
        return {}
    if file not in files:
        raise Stop(
            f"--config {file} is not a tracked file of {ROOT}, and only those are copied: "
            "write its path from there, git add it"
        )
    text = (ROOT / file).read_text("utf-8-sig")
    found: dict = {}
    if file.endswith(".json"):
        try:
            found = dict(json.loads(text))
        except (ValueError, TypeError):
            raise Stop(f"--config {file} is not a JSON object of settings") from None
    else:
        lines = re.finditer(
            r"""^["']?(name|runs)["']?[ \t]*:[ \t]+(.*?)[ \t]*(?:[ \t]#.*)?$""", text, re.MULTILINE
        )
        found = {line[1]: line[2].strip("\"'") for line in lines}
    return {name: str(found[name]) for name in ("name", "runs") if found.get(name)}


def check_bucket(slice_: Slice, job: Job) -> None:
    """Raise Stop if the bucket does not exist."""
    if job.bucket:
        done = slice_.gcloud(
            "storage", "buckets", "describe", f"gs://{job.bucket}", "--format=value(name)"
        )
        if done.returncode:
            cure = f"if it does not exist: gcloud storage buckets create gs://{job.bucket}"
            raise Stop(f"--runs {job.runs}: {last_line(done.stderr)}; {cure}")


def check_agent(kind: Accelerator) -> None:
    """Raise Stop if the SSH agent has keys, but not gcloud's.

    gcloud connects to several hosts only if the agent holds its key, or none at all.
    """
    if kind.hosts == 1:
        return
    key = Path(AGENT_KEY).expanduser()
    held = output_of("ssh-add", "-l")
    mine = output_of("ssh-keygen", "-lf", str(key)).split()[1:2]  # its fingerprint
    if not held or (key.exists() and not mine) or (mine and mine[0] in held):
        return
    make = "" if key.exists() else f"ssh-keygen -t rsa -f {AGENT_KEY} && "
    raise Stop(
        f"{kind.type} has {kind.hosts} hosts, and your SSH agent lacks gcloud's key; "
        f"type: {make}ssh-add {AGENT_KEY}"
    )


def output_of(*argv: str) -> str:
    """Return the output of a command, or an empty text if it fails or is missing."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def check_environment(file: Path) -> None:
    """Raise Stop if a file of secrets is missing, readable by others, or not NAME=VALUE lines."""
    if not file.is_file():
        raise Stop(f"--env-file {file}: no such file")
    if file.stat().st_mode & 0o077:
        raise Stop(f"--env-file {file} can be read by others: chmod 600 {file}")
    try:
        text = textfile.read(file, what="file of NAME=VALUE lines")
    except UserError as error:
        raise Stop(f"--env-file {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line and not line.startswith("#") and not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", line):
            raise Stop(
                f"--env-file {file}, line {number}: write NAME=VALUE, "
                "without export or spaces around ="
            )
