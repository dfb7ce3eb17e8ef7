"""A place where immutable objects lie under plain names: a folder, or any URL that fsspec knows.

A folder is written by storage.py and read without following a link. An object store is asked only what all of them can do: whole puts,
reads of ranges, lists, deletes. It knows nothing of what the objects are, and it writes no secret of a URL into a message.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from potstill import storage
from potstill.environment import redact_text
from potstill.errors import StorageError
from potstill.lock import Lock
from potstill.manifest import check_name, open_inside
from potstill.storage import OPERATIONS, TEMPORARY

Range = tuple[str, int, int]
_OPEN_FILES = 128              # a process may hold 1,024; caches of thousands of shards must not run into that
_RANGES_AT_ONCE = 1024


class Place(Protocol):
    """`name` is for messages. Errors are StorageErrors; one with errno ENOENT means that the object is not there."""

    @property
    def name(self) -> str: ...

    def prepare(self) -> None:
        """Makes the place if it is not there."""
        ...

    def sizes(self) -> dict[str, int]:
        """The objects here and their bytes; nothing below a sub-folder, nothing that is a link. Empty where the place is not."""
        ...

    def read(self, name: str) -> bytes: ...

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """For each (name, first byte, byte after the last) what lies there; shorter where the object ends before."""
        ...

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Durable on return."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Durable on return; what is not there is passed over."""
        ...

    def lock(self, name: str, *, held: str, remedy: str) -> "AbstractContextManager[Any]":
        """Held until the context ends or the process dies. Raises RunFolderError at once where another process holds it; promises nothing
        where a place knows no locks."""
        ...

    def unfinished(self) -> dict[str, str]:
        """Temporary names that writers left here, and the name that each was to become."""
        ...


def place_at(path: str) -> Place:
    """A folder for a plain path or file://, else what fsspec makes of the URL. Raises StorageError where it makes nothing of it."""
    if "://" not in path and "::" not in path:
        return Folder(Path(path))
    for scheme in ("file://", "local://"):
        if path.startswith(scheme):
            return Folder(Path(path.removeprefix(scheme)))
    return ObjectStore(path)


# ---------------------------------------------------------------- a folder


class _OpenFile:
    """Closed when nobody reads it any more, so that another thread may put it out of the list of open files meanwhile."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        remedy = "is it a link?" if error.errno == errno.ELOOP else "was it deleted, or the disk unmounted?"
        explained = StorageError(f"{path}: cannot be read ({error.strerror or error}); {remedy}")
        explained.errno = error.errno
        raise explained from error


class Folder:
    """Reads by pread from files kept open: a file that is cut meanwhile gives a short read, where a memory map would end the process."""

    def __init__(self, path: Path):
        self.path = path.expanduser().resolve()  # the user's own path may be a link; below it none is followed
        self._open: dict[str, _OpenFile] = {}

    @property
    def name(self) -> str:
        return str(self.path)

    def prepare(self) -> None:
        storage.make_folder(self.path)

    def _entries(self) -> list[os.DirEntry]:
        with _reading(self.path), suppress(FileNotFoundError), os.scandir(self.path) as entries:
            return [entry for entry in entries if entry.is_file(follow_symlinks=False)]
        return []

    def sizes(self) -> dict[str, int]:
        found = {}
        for entry in self._entries():
            with suppress(FileNotFoundError):
                found[entry.name] = entry.stat(follow_symlinks=False).st_size
        return found

    def unfinished(self) -> dict[str, str]:
        names = [entry.name for entry in self._entries() if entry.name.startswith(TEMPORARY)]
        return {name: name.removeprefix(TEMPORARY).rsplit("-", 2)[0] for name in names}

    def _file(self, name: str) -> _OpenFile:
        file = self._open.pop(name, None)
        if file is None:
            file = _OpenFile(open_inside(self.path, name))
            while len(self._open) >= _OPEN_FILES:
                with suppress(StopIteration, KeyError):
                    del self._open[next(iter(self._open))]
        self._open[name] = file
        return file

    def read(self, name: str) -> bytes:
        with _reading(self.path / name):
            return _pread(open_file := _OpenFile(open_inside(self.path, name)), 0, os.fstat(open_file.descriptor).st_size)

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        found = []
        for name, start, stop in ranges:
            try:
                found.append(_pread(self._file(name), start, stop - start))
            except OSError:
                with _reading(self.path / name):
                    raise
        return found

    def put(self, name: str, data: bytes | memoryview) -> None:
        check_name(name)
        storage.write_bytes(self.path / name, data)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            check_name(name)
            self._open.pop(name, None)
            storage.remove(self.path / name)
        with _reading(self.path):
            OPERATIONS.sync_folder(self.path)

    @contextmanager
    def lock(self, name: str, *, held: str, remedy: str) -> Iterator[None]:
        lock = Lock(self.path / name, held=held, remedy=remedy)
        try:
            yield
        finally:
            lock.release()


def _pread(file: _OpenFile, start: int, count: int) -> bytes:
    data = os.pread(file.descriptor, count, start)
    while len(data) < count:  # the kernel reads at most 2 GiB at once
        more = os.pread(file.descriptor, count - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


# ---------------------------------------------------------------- an object store


class ObjectStore:
    """A folder of objects behind fsspec. Keys and options come from the environment or from fsspec's own configuration."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        self.name = redact_text(self.url)
        with self._explaining(""):
            self._system, self._root = fsspec.core.url_to_fs(self.url)
        self._root = self._root.rstrip("/")

    @contextmanager
    def _explaining(self, name: str) -> Iterator[None]:
        # Every store has errors of its own kind, few of them OSErrors.
        try:
            yield
        except Exception as error:
            where = f"{self.name}/{name}" if name else self.name
            explained = StorageError(f"{where}: {type(error).__name__}: {redact_text(str(error)) or 'no words'}; is the address right?")
            explained.errno = errno.ENOENT if isinstance(error, FileNotFoundError) else getattr(error, "errno", None)
            raise explained from error

    def _path(self, name: str) -> str:
        check_name(name)
        return f"{self._root}/{name}"

    def prepare(self) -> None:
        with suppress(Exception):  # most stores know no folders; a put that fails says why
            self._system.makedirs(self._root, exist_ok=True)

    def sizes(self) -> dict[str, int]:
        with self._explaining(""):
            self._system.invalidate_cache(self._root)
            try:
                found = self._system.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in found if entry["type"] == "file"}

    def unfinished(self) -> dict[str, str]:
        return {}

    def read(self, name: str) -> bytes:
        path = self._path(name)
        with self._explaining(name):
            return bytes(self._system.cat_file(path))

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        found = [b""] * len(ranges)
        asked = [(number, wanted) for number, wanted in enumerate(ranges) if wanted[2] > wanted[1]]  # HTTP knows no range of nothing
        for first in range(0, len(asked), _RANGES_AT_ONCE):
            part = asked[first : first + _RANGES_AT_ONCE]
            names, starts, stops = (list(column) for column in zip(*(wanted for _, wanted in part), strict=True))
            paths = [self._path(name) for name in names]
            with self._explaining(""):
                answers = self._system.cat_ranges(paths, starts, stops, on_error="return")
            for (number, (name, _, _)), answer in zip(part, answers, strict=True):
                with self._explaining(name):
                    if isinstance(answer, Exception):
                        raise answer
                found[number] = bytes(answer)
        return found

    def put(self, name: str, data: bytes | memoryview) -> None:
        path = self._path(name)
        with self._explaining(name):
            OPERATIONS.put_object(self._system, path, bytes(data))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            with self._explaining(name), suppress(FileNotFoundError):
                OPERATIONS.delete_object(self._system, path)

    def lock(self, name: str, *, held: str, remedy: str) -> "AbstractContextManager[Any]":
        return nullcontext()
