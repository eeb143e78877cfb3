"""A simulated gcloud for --dry-run: every command succeeds at once."""

import json
import subprocess
from collections.abc import Sequence

from accelerators import ACCELERATORS


class Rehearsal:
    """Answers like gcloud. `there`: whether the slice exists at the start."""

    def __init__(self, there: bool):
        self.there = there
        self.hosts = 1
        self.started = False

    def answer(self, argv: Sequence[str]) -> subprocess.CompletedProcess:
        """Return what gcloud would answer to a command."""
        group, verb = (argv[3], argv[4]) if argv[1] == "compute" else ("", "")
        if verb == "create":
            self.there = True
            kind = next(
                word.split("=", 1)[1] for word in argv if word.startswith("--accelerator-type=")
            )
            self.hosts = ACCELERATORS[kind].hosts
        elif verb == "delete":
            self.there = False
        elif verb == "describe":
            if not self.there:
                return subprocess.CompletedProcess(argv, 1, "", "NOT_FOUND")
            found = (
                {"state": {"state": "ACTIVE"}}
                if group == "queued-resources"
                else {"state": "READY"}
            )
            return subprocess.CompletedProcess(argv, 0, json.dumps(found), "")
        elif verb == "ssh":
            return subprocess.CompletedProcess(argv, 0, self.job_output(argv), "")
        return subprocess.CompletedProcess(argv, 0, "", "")

    def job_output(self, argv: Sequence[str]) -> str:
        """Return the hosts' answer to `job.sh status`: none, or finished if the run was started."""
        command = next((word for word in argv if word.startswith("--command=")), "")
        self.started |= " start " in command
        return (
            f"jaxppo-host rehearsal {'exit 0' if self.started else 'none'}\n"
            * self.hosts
            * (" status " in command)
        )
