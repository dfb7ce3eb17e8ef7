"""One run per folder: an exclusive lock that the kernel gives back when its owner dies, however it dies.

The file holds host, pid and start time for messages; the lock itself is flock on the file, which stays where it is. On a network
file system whose flock is local to each machine two machines can both hold it; docs/run_folder.md says so.
"""

import fcntl
import json
import os
import socket
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path

from potstill.errors import RunFolderError
from potstill.storage import to_json

_ORPHANS_LEAVE_SECONDS = 5.0
_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _is_dead(content: bytes) -> bool:
    """Whether the owner was a process of this host that is no more; then only a child of it, on its way out, can hold the lock."""
    try:
        owner = json.loads(content)
        if owner["host"] != socket.gethostname():
            return False
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def _describe(content: bytes) -> str:
    try:
        owner = json.loads(content)
        return f"host {owner['host']}, process {owner['pid']}, since {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"


class Lock:
    """Held from construction until `release`, or until this process dies. Raises RunFolderError at once if another run holds it.

    `taken_over` describes the owner that died without releasing it, else None.
    """

    def __init__(
        self, path: Path, *, held: str = "another run is using this folder", remedy: str = "stop it, or set run.folder to another one"
    ):
        self.path, self._held, self._remedy = path, held, remedy
        self.taken_over: str | None = None
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be opened to lock the folder ({error.strerror}); is it writable?") from error
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise
        former = self._read()
        if former:
            self.taken_over = _describe(former)
        self._state(to_json({"host": socket.gethostname(), "pid": os.getpid(), "started": datetime.now(UTC).isoformat(timespec="seconds")}))
        _held.add(self)

    def _take(self) -> None:
        deadline = time.monotonic() + _ORPHANS_LEAVE_SECONDS
        while True:
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = self._read()
                if not _is_dead(owner) or time.monotonic() > deadline:
                    text = f"{self.path.parent}: {self._held} ({_describe(owner)}); wait for it, {self._remedy}"
                    raise RunFolderError(text) from None
                time.sleep(0.02)
            except OSError as error:
                remedy = "set run.folder to a local one"
                raise RunFolderError(f"{self.path}: this file system cannot lock ({error.strerror}); {remedy}") from error

    def _read(self) -> bytes:
        return os.pread(self._descriptor, 4096, 0)

    def _state(self, text: str) -> None:
        # For messages only: a torn or missing description must never stop a run, so no sync and no failure.
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)
        except OSError:
            pass

    def release(self) -> None:
        """Gives the lock back; a second call does nothing."""
        if self._descriptor >= 0:
            self._state("")
            self.forget()

    def forget(self) -> None:
        """Closes this process's descriptor without giving back a lock that another process shares."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        _held.discard(self)


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


# A forked data worker would otherwise keep the lock of a run that was killed.
os.register_at_fork(after_in_child=_forget_all)
