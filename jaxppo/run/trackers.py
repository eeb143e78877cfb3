"""Other places for a run's numbers, beside its metrics.jsonl, which stays the record:
TensorBoard and W&B (--track).

Numbers alone are sent, and settings: no text of prompts or samples, no output of the
terminal, no code. A tracker is made from the record: where a run goes on it is given
the lines before, and has no step twice. One that fails is left out with a warning, and
the run goes on.
"""

import netrc
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from jaxppo.config import RunConfig, tracker_names
from jaxppo.parallel.processes import first_line
from jaxppo.run.files import read_lines, shown
from jaxppo.run.log import Log
from jaxppo.run.settings import to_dict

Say = Callable[[str], None]
Rows = Sequence[dict[str, float]]
# seconds for W&B's server at the start, and for the rest of the data at the end
PATIENCE = 30.0


class Sink(Protocol):
    """One tracker; any of its calls may raise whatever it likes."""

    def log(self, rows: Rows) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in <folder>/tensorboard, written anew from the record each time a run
    begins or goes on: so no step is there twice, whatever reads them, and none is
    missing that a killed process had not written yet.
    """

    def __init__(self, config: RunConfig, folder: Path, say: Say):
        # Its SummaryWriter hands the events to a thread: on a full disk that ends, its
        # queue fills up, and the next step waits for ever. This one writes when it is
        # told to, and says so when it cannot.
        from tensorboardX.event_file_writer import EventsWriter

        place = folder / "tensorboard"
        place.mkdir(exist_ok=True)
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = EventsWriter(str(place / "events"))

    def log(self, rows: Rows) -> None:
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2

        for row in rows:
            # pyright: ignore
            event = event_pb2.Event(step=int(row["step"]), wall_time=time.time())
            for name, x in row.items():
                if name != "step":
                    event.summary.value.extend(summary.scalar(name, x).value)
            self.writer.write_event(event)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases in <folder>/wandb. WANDB_MODE, WANDB_API_KEY,
    WANDB_PROJECT and the like say where it goes; without a key, or without an answer of
    the server, it stays on disk (`wandb sync` sends it).

    Its server takes no step twice: a run that goes on sends the steps that are new to
    it. On disk all are written again, and what was there of this run before goes.
    """

    def __init__(self, config: RunConfig, folder: Path, say: Say):
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # its own faults, which it tells to others
        (folder / "wandb").mkdir(exist_ok=True)
        known = folder / "wandb" / "run-id.txt"
        if not known.exists():
            known.write_text(uuid.uuid4().hex[:12])
        name = known.read_text().strip()
        mode = os.environ.get("WANDB_MODE")
        if mode not in ("offline", "dryrun", "disabled") and not has_key():
            say("W&B: there is no API key: it is written offline (WANDB_API_KEY or wandb login)")
            mode = "offline"
        try:
            self.run = started(config, folder, name, mode)
        except Exception as error:
            if mode in ("offline", "dryrun", "disabled"):
                raise
            say(f"warning: W&B does not answer ({first_line(error)}): it is written offline")
            self.run = started(config, folder, name, "offline")
        self.next = (
            self.run.step
        )  # 0 in a new run, else one more than the last step that the server has
        if self.run.offline:
            own = Path(self.run.dir).parent
            for old in (folder / "wandb").glob(f"offline-run-*-{name}"):
                if old.name != own.name:
                    shutil.rmtree(old)
            say(f"W&B: to send what is written: wandb sync {folder / 'wandb' / own.name}")
        elif mode != "disabled":
            say(f"W&B: {self.run.url}")

    def log(self, rows: Rows) -> None:
        for row in rows:
            step = int(row["step"])
            if step >= self.next:
                self.run.log({name: x for name, x in row.items() if name != "step"}, step=step)

    def close(self) -> None:
        self.run.finish()


def started(config: RunConfig, folder: Path, name: str, mode: str | None) -> Any:
    """A run of W&B that takes nothing of its own accord: no terminal, whose tables are
    samples; no command, code or packages.
    """
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_save_requirements=False,
        x_disable_machine_info=True,
        init_timeout=PATIENCE,
        finish_timeout=PATIENCE,
    )
    return wandb.init(
        dir=str(folder),
        id=name,
        resume="allow",
        name=f"{folder.parent.name}/{folder.name}",
        mode=mode,  # pyright: ignore
        project=os.environ.get("WANDB_PROJECT", "jaxppo"),
        config=shown(to_dict(config)),
        settings=settings,
    )


def has_key() -> bool:
    """Whether W&B finds a key where it looks for one: in the environment, or in
    ~/.netrc, where `wandb login` puts it.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        return bool(netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


SINKS: dict[str, Callable[[RunConfig, Path, Say], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


class Beside(Log):
    """A log, and beside it the trackers that still work."""

    def __init__(self, log: Log, config: RunConfig, folder: Path):
        self.main, self.sinks = log, {}
        kept = read_lines(folder / "metrics.jsonl")
        for name in tracker_names(config):
            self._try(
                name,
                lambda name=name: self._begin(name, SINKS[name](config, folder, self.say), kept),
            )

    def _begin(self, name: str, sink: Sink, kept: Rows) -> None:
        self.sinks[name] = sink
        sink.log(kept)

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.sinks.pop(name, None)
            self.say(
                f"warning: --track {name} is left out from here on ({first_line(error)}); metrics.jsonl has every step"
            )

    def log(self, rows: Rows) -> None:
        self.main.log(rows)
        for name, sink in list(self.sinks.items()):
            self._try(name, lambda sink=sink: sink.log(rows))

    def say(self, text: str) -> None:
        self.main.say(text)

    def samples(self, rows: Sequence[dict]) -> None:
        self.main.samples(rows)

    def settle(self) -> None:
        self.main.settle()

    def close(self) -> None:
        for name, sink in list(self.sinks.items()):
            self._try(name, sink.close)
        self.main.close()


def with_trackers(log: Log, config: RunConfig, folder: Path) -> Log:
    """The log with the trackers of --track beside it; their packages are there, as
    `config.validate_run` has seen.
    """
    return Beside(log, config, folder) if tracker_names(config) else log
