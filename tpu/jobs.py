"""What is to run: a script of the repository with its options; and what must be right before anything is paid for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerators import Accelerator
from basics import ROOT, Stop, last_line, tracked
from slices import Slice


@dataclass(frozen=True)
class Job:
    """A script of the repository with its options."""

    script: str
    options: tuple[str, ...]
    name: str  # of the run: the same after every restart
    runs: str  # its folder

    @property
    def bucket(self) -> str:
        return self.runs.split("/")[2] if self.runs.startswith("gs://") else ""

    def command(self, kind: Accelerator) -> list[str]:
        """What every host runs; job.sh adds --resume when there is a checkpoint."""
        words = ["python", self.script, *self.options]
        own = {"--name": self.name, "--expect-devices": str(kind.chips)} | ({"--distributed": "on"} if kind.hosts > 1 else {})
        for option, value in own.items():
            words += [] if value_of(option, self.options) else [option, value]
        return words


def value_of(option: str, words: Sequence[str]) -> str:
    """The last value given to an option, or nothing.

    >>> value_of("--runs", ["--steps", "3", "--runs=a", "--runs", "b"]), value_of("--name", ["--names", "x"])
    ('b', '')
    """
    found = ""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == option:
            found = following
        elif word.startswith(option + "="):
            found = word.split("=", 1)[1]
    return found


def job_of(words: list[str], slice_name: str, kind: Accelerator) -> Job:
    """The job after --. Raises Stop."""
    if not words:
        raise Stop("no job; give it after --, such as: -- experiments/sentiment.py --steps 100")
    script, options = words[0], tuple(words[1:])
    if script not in tracked():
        raise Stop(f"{script} is no tracked file of {ROOT}, and only those are copied: write its path from there, git add it")
    job = Job(script, options, value_of("--name", options) or slice_name, value_of("--runs", options) or "runs")
    if not re.fullmatch(r"(?=.*[^.])[A-Za-z0-9._-]{1,64}", job.name):
        raise Stop(f"--name {job.name!r}: use 1 to 64 letters, digits, '.', '_' or '-'")
    if job.runs.startswith("gs:") and not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._-]+)*/?", job.runs):
        raise Stop(f"--runs {job.runs!r}: write gs://BUCKET/FOLDER")
    if kind.hosts > 1 and not job.bucket:
        raise Stop(
            f"{kind.type} has {kind.hosts} hosts, each with its own disk: give the job --runs gs://BUCKET/FOLDER, not {job.runs}"
        )
    return job


def check_bucket(slice_: Slice, job: Job) -> None:
    """The bucket is there, before anything is paid for. Raises Stop."""
    if job.bucket:
        done = slice_.gcloud("storage", "buckets", "describe", f"gs://{job.bucket}", "--format=value(name)")
        if done.returncode:
            raise Stop(
                f"--runs {job.runs}: {last_line(done.stderr)}; make it with: gcloud storage buckets create gs://{job.bucket}"
            )


def check_environment(file: Path) -> None:
    """Raises Stop."""
    if not file.is_file():
        raise Stop(f"--env-file {file}: there is no such file")
    if file.stat().st_mode & 0o077:
        raise Stop(f"--env-file {file} can be read by others: chmod 600 {file}")
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line and not line.startswith("#") and not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", line):
            raise Stop(f"--env-file {file}, line {number}: write NAME=VALUE, without export or spaces around =")
