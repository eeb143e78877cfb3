"""Lock a run's folder, so that two runs cannot overwrite each other's checkpoints."""

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

from jaxppo.data import textfile
from jaxppo.errors import UserError

HEARTBEAT = 10.0  # seconds between two updates of the lock file's time
STALE = 60.0  # seconds without an update after which an owner elsewhere counts as gone


class RunLock:
    """The lock of a run's folder, held until `release` or the end of the process.

    On one machine the kernel holds the lock, so it goes when its owner is killed. An
    owner on another machine, or a file system without locks, is judged by the age of
    `lock.json`, which the owner updates every few seconds.

    Raises UserError, which names the owner, if the folder is locked.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lock.json"
        try:
            self.file = self.path.open("a+")
        except OSError as error:
            raise UserError(
                f"cannot write to {folder} ({error.strerror}); choose another --runs folder"
            ) from error
        owner = textfile.read_object(self.path)
        if not self._acquire(owner):
            self.file.close()
            raise UserError(
                f"{folder} belongs to {describe(owner)}; wait for it, or choose another --name"
            )
        if owner:
            print(f"taking over {folder} from {describe(owner)}, which is gone", file=sys.stderr)
        # Through another handle than the lock's: a mounted bucket shows what was
        # written when its handle is closed.
        self.path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self.released = threading.Event()
        threading.Thread(target=self._keep_alive, name="lock", daemon=True).start()

    def _acquire(self, owner: dict) -> bool:
        """Whether this process now has the lock."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            # A file system without locks: only the file's age tells.
            return not owner or not self._is_fresh()
        elsewhere = owner.get("host") not in (None, socket.gethostname())
        return not (elsewhere and self._is_fresh())

    def _is_fresh(self) -> bool:
        return time.time() - self.path.stat().st_mtime < STALE

    def _keep_alive(self) -> None:
        while not self.released.wait(HEARTBEAT):
            try:
                os.utime(self.path)
            except OSError:  # the folder is gone: the next checkpoint reports it
                return

    def release(self) -> None:
        self.released.set()
        # Emptied, not removed: a process that has just opened the file would otherwise
        # lock a file that no longer has a name. A missing folder was reported already.
        with contextlib.suppress(OSError):
            self.path.write_text("")
        self.file.close()


def describe(owner: dict) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown machine')}"
