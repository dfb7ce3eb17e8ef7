"""The one module that writes: every open, write, fsync, rename and unlink of Potstill's own files passes through OPERATIONS.

A file is written under a temporary name, synced, renamed, and its folder synced; a folder is committed the same way, with
MANIFEST.json (size and xxh3 of each file) written last. It knows nothing of runs, models or checkpoints, and no torch.
The reading side stands in manifest.py and is offered here too.
"""

import errno
import fcntl
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.errors import StorageError
from potstill.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    check_name,
    measure,
    read_bytes,
    read_json,
    read_lines,
    read_manifest,
    read_tensors,
    to_json,
    verify_folder,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [  # what other rooms may use, whichever of the two files holds it
    "MANIFEST", "OPERATIONS", "Manifest", "append_lines", "check_name", "commit_folder", "free_bytes", "make_folder", "probe", "read_bytes",
    "read_json", "read_lines", "read_manifest", "read_tensors", "remove", "require_free", "sweep", "sync_file", "temporary", "to_json",
    "verify_folder", "write_bytes", "write_json", "write_tensors", "write_text",
]  # fmt: skip

TEMPORARY = ".tmp-"    # an unfinished file or folder, or one being deleted; swept at the next start
ASIDE = ".old-"        # the former content of a folder while its replacement is renamed into place
_CHUNK = 16 * 2**20
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_serial = itertools.count()


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _fsync(descriptor: int) -> None:
    if sys.platform == "darwin":  # there fsync stops at the drive's cache
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Operations:
    """Everything that changes a disk. A fault injector replaces these fields; nothing else in Potstill writes."""

    create: Callable[[Path], int] = _create
    append: Callable[[Path], int] = _append
    write: Callable[[int, memoryview], int] = os.write
    truncate: Callable[[int, int], None] = os.ftruncate
    fsync: Callable[[int], None] = _fsync
    close: Callable[[int], None] = os.close
    rename: Callable[[Path, Path], None] = os.rename
    unlink: Callable[[Path], None] = os.unlink
    mkdir: Callable[[Path], None] = os.mkdir
    rmdir: Callable[[Path], None] = os.rmdir
    sync_folder: Callable[[Path], None] = _sync_folder
    put_object: Callable[[Any, str, bytes], None] = lambda system, path, data: system.pipe_file(path, data)
    delete_object: Callable[[Any, str], None] = lambda system, path: system.rm_file(path)


OPERATIONS = Operations()


def _explain(error: OSError, path: Path, bytes_needed: int) -> StorageError:
    if error.errno in _DISK_FULL:
        free = free_bytes(path)
        limit = "the limit on file size is reached" if error.errno == errno.EFBIG else "the disk or its quota is full"
        needed = f"{bytes_needed:,} bytes are needed, {free:,}" if bytes_needed else f"more bytes are needed than the {free:,} that"
        text = f"{path}: {limit}: {needed} are free"
        text += "; what was committed before is whole: make room and run again"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        text = f"{path}: cannot write here ({error.strerror}); make the folder writable or choose another one"
    elif error.errno == errno.ENOENT:
        text = f"{path}: the folder is gone ({error.strerror}); was it deleted or unmounted while the run was under way?"
    else:
        text = f"{path}: {error.strerror or error}; check the disk, then run again"
    explained = StorageError(text)
    explained.errno = error.errno
    return explained


@contextmanager
def _explaining(path: Path, bytes_needed: int = 0) -> Iterator[None]:
    """An OSError becomes a StorageError that names the path and the bytes needed."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise _explain(error, path, bytes_needed) from error


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    for start in range(0, len(view), _CHUNK):
        part = view[start : start + _CHUNK]
        while len(part):
            part = part[OPERATIONS.write(descriptor, part) :]


def _write_new(path: Path, data: bytes | memoryview) -> None:
    descriptor = OPERATIONS.create(path)
    try:
        _write_all(descriptor, data)
        OPERATIONS.fsync(descriptor)
    finally:
        OPERATIONS.close(descriptor)


def temporary(path: Path) -> Path:
    """A name beside `path` that the next sweep removes if nobody renames it."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{next(_serial)}")


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Durable and atomic: after a crash at any instant `path` holds the old bytes or the new ones. Raises StorageError."""
    unfinished = temporary(path)
    with _explaining(path, len(data)):
        try:
            _write_new(unfinished, data)
            OPERATIONS.rename(unfinished, path)
            OPERATIONS.sync_folder(path.parent)
        except Exception:
            with suppress(OSError):
                OPERATIONS.unlink(unfinished)
            raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file. The tensors must be dense and share no memory; the file's size is held in memory once."""
    from safetensors.torch import save

    write_bytes(path, save(dict(tensors), metadata))


def append_lines(path: Path, lines: Iterable[str], *, sync: bool = False) -> None:
    """Appends whole lines; a write that fails half-way is cut back, so that the next line does not start inside a torn one."""
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    with _explaining(path, len(data)):
        descriptor = OPERATIONS.append(path)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, data)
                if sync:
                    OPERATIONS.fsync(descriptor)
            except Exception:
                with suppress(OSError):
                    OPERATIONS.truncate(descriptor, size)
                raise
        finally:
            OPERATIONS.close(descriptor)
        if sync and size == 0:
            OPERATIONS.sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Makes durable what was appended to `path`, and its name."""
    with _explaining(path):
        _sync_existing(path)
        OPERATIONS.sync_folder(path.parent)


def _sync_existing(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        OPERATIONS.fsync(descriptor)
    finally:
        OPERATIONS.close(descriptor)


# ---------------------------------------------------------------- folders


def make_folder(path: Path) -> None:
    """Creates `path` and its missing parents, each durable in its own parent."""
    with _explaining(path):
        missing = [folder for folder in [path, *path.parents] if not folder.exists()]
        for folder in reversed(missing):
            with suppress(FileExistsError):
                OPERATIONS.mkdir(folder)
            OPERATIONS.sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Deletes a file, a link (never what it points to) or a whole folder. It vanishes at once, its parts after it."""
    with _explaining(path):
        if not os.path.lexists(path):
            return
        if path.is_symlink() or not path.is_dir():
            OPERATIONS.unlink(path)
        elif path.name.startswith(TEMPORARY):
            _remove_tree(path)
        else:
            doomed = temporary(path)
            OPERATIONS.rename(path, doomed)
            OPERATIONS.sync_folder(path.parent)
            _remove_tree(doomed)


def _remove_tree(folder: Path) -> None:
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            _remove_tree(Path(entry.path))
        else:
            OPERATIONS.unlink(Path(entry.path))
    OPERATIONS.rmdir(folder)


def sweep(folder: Path) -> list[str]:
    """Removes what a killed writer left in `folder`, and puts back a folder whose replacement was not finished.

    Call it only under the lock. Returns the names that it removed or put back.
    """
    found = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.name.startswith(ASIDE):
            former = folder / entry.name.removeprefix(ASIDE)
            if former.exists():
                remove(entry)
            else:
                with _explaining(entry):
                    OPERATIONS.rename(entry, former)
                    OPERATIONS.sync_folder(folder)
        elif entry.name.startswith(TEMPORARY):
            remove(entry)
        else:
            continue
        found.append(entry.name)
    return found


def commit_folder(
    final: Path, writer: Callable[[Path], object], *, facts: Mapping[str, Any] | None = None, replace: bool = False, bytes_needed: int = 0
) -> Manifest:
    """Runs `writer(folder)` in a temporary folder, syncs every file, writes the manifest, and renames the folder to `final`.

    After a crash at any instant `final` is absent, the former folder (with `replace`; `sweep` may have to put it back) or whole.
    """
    unfinished = temporary(final)
    aside = final.with_name(ASIDE + final.name)
    with _explaining(final, bytes_needed):
        if final.exists() and not replace:
            raise StorageError(f"{final}: exists already; delete it or choose another name")
        try:
            OPERATIONS.mkdir(unfinished)
            writer(unfinished)
            manifest = Manifest(_sync_tree(unfinished), dict(facts or {}))
            _write_new(unfinished / MANIFEST, manifest.text().encode())
            OPERATIONS.sync_folder(unfinished)
            if final.exists():
                remove(aside)
                OPERATIONS.rename(final, aside)
            OPERATIONS.rename(unfinished, final)
            OPERATIONS.sync_folder(final.parent)
        except Exception as error:
            with suppress(OSError):
                if aside.exists() and not final.exists():
                    OPERATIONS.rename(aside, final)
                remove(unfinished)
            # Say which folder and how much in all. Writers made in Rust (safetensors, tokenizers) hide the number in their text.
            in_text = re.search(r"\(os error (\d+)\)", str(error))
            number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
            if number is not None:
                raise OSError(number, os.strerror(number)) from error
            raise
        remove(aside)
    return manifest


def _sync_tree(folder: Path) -> dict[str, FileRecord]:
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        check_name(name)
        if path.is_symlink():
            raise StorageError(f"{path}: a link cannot be committed; write the file itself")
        if path.is_dir():
            OPERATIONS.sync_folder(path)
        else:
            _sync_existing(path)
            files[name] = measure(folder, name)
    return files


# ---------------------------------------------------------------- space and probes


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` is or will be."""
    existing = next((folder for folder in [path, *path.parents] if folder.exists()), Path("/"))
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def require_free(path: Path, bytes_needed: int) -> None:
    """Raises StorageError if fewer than `bytes_needed` bytes are free where `path` is."""
    free = free_bytes(path)
    if free < bytes_needed:
        raise StorageError(f"{path}: {bytes_needed:,} bytes are needed and {free:,} are free; make room or choose another folder")


def probe(folder: Path) -> None:
    """Creates, syncs, renames and deletes one small file, so that a folder that cannot hold a run is refused at once."""
    path = folder / f"{TEMPORARY}probe"
    write_bytes(path, b"potstill\n")
    remove(path)
