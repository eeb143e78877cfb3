"""Send the metrics of a run to TensorBoard or W&B (--track), besides metrics.jsonl.

Only metrics and settings are sent: no text of prompts or samples, no terminal output,
no code. A tracker that fails is dropped with a warning, and the run continues. A
resumed run replays its metrics.jsonl to the trackers, so they have every step once.
"""

import contextlib
import netrc
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from jaxppo.config import RunConfig, tracker_names
from jaxppo.errors import first_line
from jaxppo.run.files import hide_secrets, read_metrics
from jaxppo.run.log import FileLog
from jaxppo.run.settings import to_dict

Say = Callable[[str], None]
Rows = Sequence[dict[str, float]]
# seconds for W&B's server at the start, and for the last data at the end
TIMEOUT = 30.0
NOT_ONLINE = ("offline", "dryrun", "disabled")  # values of WANDB_MODE


class Tracker(Protocol):
    """One tracker; any of its calls may raise any exception."""

    def log(self, rows: Rows) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in <folder>/tensorboard, rewritten from metrics.jsonl when a run is
    resumed: no step is there twice, and none that a killed process lost is missing.
    """

    def __init__(self, config: RunConfig, folder: Path, say: Say):
        # tensorboardX is an optional extra. Its SummaryWriter writes in a thread, which
        # hangs the run on a full disk; this writer raises.
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
            event = event_pb2.Event(  # pyright: ignore
                step=int(row["step"]), wall_time=time.time()
            )
            for name, x in row.items():
                if name != "step":
                    event.summary.value.extend(summary.scalar(name, x).value)
            self.writer.write_event(event)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases in <folder>/wandb, set up by WANDB_MODE, WANDB_API_KEY,
    WANDB_PROJECT and the like.

    Without a key, or if the server does not answer, it is written offline, for `wandb
    sync`. The server takes no step twice, so a resumed run sends it only new steps; on
    disk, all steps are written again, and earlier files of the run are removed.
    """

    def __init__(self, config: RunConfig, folder: Path, say: Say):
        # reports of its own errors
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        (folder / "wandb").mkdir(exist_ok=True)
        id_file = folder / "wandb" / "run-id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        name = id_file.read_text().strip()
        mode = os.environ.get("WANDB_MODE")
        if mode not in NOT_ONLINE and not has_api_key():
            say("W&B: there is no API key: it is written offline (WANDB_API_KEY or wandb login)")
            mode = "offline"
        try:
            self.run = init_wandb(config, folder, name, mode)
        except Exception as error:
            if mode in NOT_ONLINE:
                raise
            say(f"warning: W&B does not answer ({first_line(error)}): it is written offline")
            self.run = init_wandb(config, folder, name, "offline")
        # 0 in a new run, otherwise one more than the server's last step
        self.next = self.run.step
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


def init_wandb(config: RunConfig, folder: Path, name: str, mode: str | None) -> Any:
    """Start a W&B run that collects nothing by itself: no terminal output, command,
    code or packages.
    """
    import wandb  # an optional extra

    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_save_requirements=False,
        x_disable_machine_info=True,
        init_timeout=TIMEOUT,
        finish_timeout=TIMEOUT,
    )
    return wandb.init(
        dir=str(folder),
        id=name,
        resume="allow",
        name=f"{folder.parent.name}/{folder.name}",
        mode=mode,  # pyright: ignore
        project=os.environ.get("WANDB_PROJECT", "jaxppo"),
        config=hide_secrets(to_dict(config)),
        settings=settings,
    )


def has_api_key() -> bool:
    """Whether W&B will find a key, in the environment or in ~/.netrc (`wandb
    login`).
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        return bool(netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


TRACKERS: dict[str, Callable[[RunConfig, Path, Say], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


class TrackedLog(FileLog):
    """A file log that passes its metrics on to the trackers that still work.
    `config.validate_run` has checked that their packages are installed.
    """

    def __init__(self, config: RunConfig, folder: Path, **options: Any):
        super().__init__(folder, **options)
        self.trackers, names = {}, tracker_names(config)
        past = read_metrics(folder) if names else []
        for name in names:
            with self._dropping(name):
                self.trackers[name] = TRACKERS[name](config, folder, self.say)
                self.trackers[name].log(past)

    @contextlib.contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        """Drop a tracker with a warning if the block raises."""
        try:
            yield
        except Exception as error:
            self.trackers.pop(name, None)
            self.say(
                f"warning: --track {name} is left out from here on ({first_line(error)}); "
                "metrics.jsonl has every step"
            )

    def log(self, rows: Rows) -> None:
        super().log(rows)
        for name, tracker in list(self.trackers.items()):
            with self._dropping(name):
                tracker.log(rows)

    def close(self) -> None:
        for name, tracker in list(self.trackers.items()):
            with self._dropping(name):
                tracker.close()
        super().close()
