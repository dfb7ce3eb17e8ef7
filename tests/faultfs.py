"""A disk that fails on purpose: it stands in for storage.OPERATIONS and stops, tears, fills up or loses power at the k-th operation.

A workload runs once per k. `Workload.check` then says whether what a reader finds is a lie or a loss.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill import storage

COUNTED = (
    "create", "append", "write", "truncate", "fsync", "rename", "unlink", "mkdir", "rmdir", "sync_folder", "put_object", "delete_object",
)  # fmt: skip
GROWING = ("create", "append", "write", "mkdir", "fsync", "put_object")     # what a full disk refuses
CRASHES = ("crash", "torn", "power_loss", "metadata_first")
# Syncing costs a hundred times more than the rest of a trial and proves nothing here: what is durable is the account kept below.
REAL = storage.Operations(fsync=lambda descriptor: None, sync_folder=lambda path: None)


class Crash(BaseException):
    """The process is dead. Not an Exception: no clean-up of the code under test may run after it."""


@contextmanager
def operations(**changed: Callable[..., Any]) -> Iterator[None]:
    """storage.OPERATIONS with some of its fields replaced."""
    former = {name: getattr(storage.OPERATIONS, name) for name in changed}
    for name, replacement in changed.items():
        setattr(storage.OPERATIONS, name, replacement)
    try:
        yield
    finally:
        for name, replacement in former.items():
            setattr(storage.OPERATIONS, name, replacement)


def without_syncing():
    return operations(fsync=REAL.fsync, sync_folder=REAL.sync_folder)


class FaultyDisk:
    """Counts operations and fails at number `at` (from 0) in the manner of `fault`.

    crash: stops before the operation. torn: half of a write reaches the disk. power_loss: what was not synced is gone, names
    included. metadata_first: names survive, unsynced bytes do not. An errno: that error, once; with `lasting`, for every
    operation from then on that needs room.
    """

    def __init__(self, root: Path, *, at: int | None = None, fault: str | int = "crash", lasting: bool = False):
        self.root, self.at, self.fault, self.lasting = root, at, fault, lasting
        self.count = 0
        self.dead = False
        self.log: list[str] = []
        self._content: dict[int, bytes] = {}                       # what is durable: bytes by inode,
        self._entries: dict[int, dict[str, tuple[int, bool]]] = {}  # and names by inode of their folder
        for folder, _, names in os.walk(root):
            self._remember_folder(folder)
            for name in names:
                path = Path(folder) / name
                self._content[path.stat().st_ino] = path.read_bytes()

    def _remember_folder(self, folder) -> None:
        with os.scandir(folder) as entries:
            found = {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in entries}
        self._entries[os.stat(folder).st_ino] = found

    def operation(self, name: str) -> Callable[..., Any]:
        real = getattr(REAL, name)

        def run(*arguments):
            if self.dead:
                raise Crash
            number, self.count = self.count, self.count + 1
            self.log.append(name)
            if number == self.at or (self.lasting and self.at is not None and number > self.at and name in GROWING):
                self._fail(name, real, arguments)
            result = real(*arguments)
            self._follow(name, arguments, result)
            return result

        return run

    def _fail(self, name, real, arguments) -> None:
        if name == "write" and self.fault != "crash":
            real(arguments[0], arguments[1][: len(arguments[1]) // 2])
        if name == "put_object" and self.fault == "torn":  # not every store puts whole objects
            real(arguments[0], arguments[1], arguments[2][: len(arguments[2]) // 2])
        if isinstance(self.fault, int):
            if name in GROWING:
                raise OSError(self.fault, os.strerror(self.fault))
            return
        self.dead = True
        raise Crash

    def _follow(self, name, arguments, result) -> None:
        """Keeps the account of what would survive a loss of power. Inodes are used again, so a new file forgets its predecessor."""
        if name in ("create", "append"):
            status = os.fstat(result)
            if status.st_size == 0:
                self._content.pop(status.st_ino, None)
        elif name == "mkdir":
            self._entries.pop(os.stat(arguments[0]).st_ino, None)
        elif name == "fsync":
            with open(f"/proc/self/fd/{arguments[0]}", "rb") as file:
                self._content[os.fstat(arguments[0]).st_ino] = file.read()
        elif name == "sync_folder":
            self._remember_folder(arguments[0])

    def installed(self):
        return operations(**{name: self.operation(name) for name in COUNTED})

    def reboot(self, target: Path) -> Path:
        """What the next process finds: `root` itself after a crash, or a copy that holds only what was durable."""
        if self.fault not in ("power_loss", "metadata_first"):
            return self.root
        shutil.rmtree(target, ignore_errors=True)
        self._rebuild(os.stat(self.root).st_ino, self.root, target)
        return target

    def _rebuild(self, inode: int, now: Path | None, target: Path) -> None:
        target.mkdir()
        durable = self._entries.get(inode, {})
        if self.fault == "metadata_first" and now is not None and now.is_dir():
            with os.scandir(now) as entries:
                durable = {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in entries}
        for name, (child, is_folder) in durable.items():
            if is_folder:
                self._rebuild(child, now / name if now is not None else None, target / name)
            else:
                (target / name).write_bytes(self._content.get(child, b""))


@dataclass
class Workload:
    """`run(root, done)` calls `done(fact)` after each thing that it was told is saved; `check(root, done)` asserts on what is found."""

    prepare: Callable[[Path], object]
    run: Callable[[Path, Callable[[Any], None]], object]
    check: Callable[[Path, list[Any]], object]


@without_syncing()
def explore(workload: Workload, scratch: Path, fault: str) -> int:
    """Runs `workload` once for every operation at which it can die; returns how many there are."""
    at = 0
    while True:
        root, done = scratch / "root", []
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        workload.prepare(root)
        disk = FaultyDisk(root, at=at, fault=fault)
        finished = False
        with disk.installed():
            try:
                workload.run(root, done.append)
                finished = True
            except Crash:
                pass
        if finished:  # `at` lies beyond the last operation; what it acknowledged must survive power loss here too
            workload.check(disk.reboot(scratch / "rebooted"), done)
            return at
        try:
            workload.check(disk.reboot(scratch / "rebooted"), done)
        except AssertionError as error:
            raise AssertionError(f"{fault} at operation {at} ({disk.log[-1]}): {error}") from error
        at += 1


@without_syncing()
def fill_up(workload: Workload, scratch: Path, error_number: int = errno.ENOSPC) -> list[str]:
    """The disk is full from the k-th operation on, for every k: returns the messages; `check` must hold after each, and a retry pass."""
    at, messages = 0, []
    while True:
        root, done = scratch / "root", []
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        workload.prepare(root)
        disk = FaultyDisk(root, at=at, fault=error_number, lasting=True)
        with disk.installed():
            try:
                workload.run(root, done.append)
            except storage.StorageError as error:
                if error.errno != error_number:
                    raise
                messages.append(str(error))
        workload.check(root, done)
        workload.run(root, done.append)
        if at > disk.count:
            return messages
        at += 1
