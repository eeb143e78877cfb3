"""One run, one writer: two runs in one folder would write over each other's
checkpoints, and neither would know.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from jaxppo.errors import UserError

BEAT = 10.0  # seconds between two signs of life
STALE = 60.0  # without one for so long, an owner on another machine is taken to be gone


class RunLock:
    """The lock of a run's folder, held until `release` or the end of the process,
    however that comes.

    On one machine (and on file systems that know locks) the kernel holds it, so that a
    killed owner holds nothing. An owner on another machine is believed as long as its
    file `lock.json` shows signs of life.

    Raises UserError, which names the owner, when the folder has one.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lock.json"
        try:
            self.file = self.path.open("a+")
        except OSError as error:
            raise UserError(
                f"cannot write to {folder} ({error.strerror}); choose another --runs folder"
            ) from error
        owner = read_owner(self.path)
        if self._taken(owner):
            self.file.close()
            raise UserError(
                f"{folder} belongs to {words(owner)}; wait for it, or choose another --name"
            )
        if owner:
            print(f"taking over {folder} from {words(owner)}, which is gone", file=sys.stderr)
        # Not by the handle that holds the lock: a bucket that is mounted shows what a
        # handle wrote when that is closed.
        self.path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self.released = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _taken(self, owner: dict) -> bool:
        """Whether somebody else holds it; otherwise we do, from now on."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return True
            # A file system without such locks: who beats in the file, wherever it runs,
            # is all that is known.
            return bool(owner) and time.time() - self.path.stat().st_mtime < STALE
        elsewhere = owner.get("host") not in (None, socket.gethostname())
        return elsewhere and time.time() - self.path.stat().st_mtime < STALE

    def _beat(self) -> None:
        while not self.released.wait(BEAT):
            try:
                os.utime(self.path)
            except OSError:  # the folder is gone: the next checkpoint says so
                return

    def release(self) -> None:
        self.released.set()
        # of a folder that is gone the reason to end has told
        with contextlib.suppress(OSError):
            self.path.write_text(
                ""
                # and not removed: who has just opened it would hold the lock of a file
                # without a name
            )
        self.file.close()


def read_owner(path: Path) -> dict:
    """What a lock file says; nothing when it says nothing."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def words(owner: dict) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown machine')}"
