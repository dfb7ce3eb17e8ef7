"""What a committed folder says about itself: MANIFEST.json names each file with its size and xxh3, and every read compares.

Names in a manifest are not trusted: nothing outside the folder is opened and no link is followed. Nothing here writes.
"""

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from potstill.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"[A-Za-z0-9._-]+\Z")
_BLOCK = 16 * 2**20


def to_json(value: Any, indent: int | None = None) -> str:
    """ASCII JSON without NaN or Infinity, which other readers refuse; raises ValueError for them."""
    return json.dumps(value, allow_nan=False, indent=indent, ensure_ascii=True)


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of one file: its size in bytes and the hexadecimal xxh3-64 of its bytes."""

    size: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """The files of a committed folder by their relative names, and small facts that the writer wished to state."""

    files: dict[str, FileRecord]
    facts: dict[str, Any]

    def text(self) -> str:
        files = {name: {"size": record.size, "xxh3": record.xxh3} for name, record in sorted(self.files.items())}
        body = {"files": files, "facts": self.facts}
        return to_json({**body, "xxh3": xxhash.xxh3_64_hexdigest(to_json(body).encode())}, indent=1) + "\n"


def check_name(name: str) -> None:
    """A relative name of at most one sub-folder, each part of [A-Za-z0-9._-]; anything else raises StorageError."""
    parts = name.split("/")
    if len(parts) > 2 or not all(_NAME.match(part) and part not in (".", "..") for part in parts):
        raise StorageError(f"{name!r}: not a name that a manifest may hold: letters, digits, '.', '_', '-' and one sub-folder at most")


def open_inside(folder: Path, name: str) -> int:
    """Opens a file of a committed folder for reading, following no link at any level below the folder's parent."""
    check_name(name)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(folder, flags | os.O_DIRECTORY)
    for part in name.split("/"):
        above = descriptor
        try:
            descriptor = os.open(part, flags, dir_fd=above)
        finally:
            os.close(above)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(f"{folder / name}: not a regular file")
    return descriptor


def measure(folder: Path, name: str) -> FileRecord:
    """Size and checksum of a file as it lies on the disk now."""
    digest, size = xxhash.xxh3_64(), 0
    with open(open_inside(folder, name), "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed folder. Raises StorageError if it is absent, torn, altered or names a file outside."""
    try:
        with open(open_inside(folder, MANIFEST), "rb") as file:
            text = file.read(64 * 2**20).decode()
        content = json.loads(text)
        files = {name: FileRecord(int(record["size"]), str(record["xxh3"])) for name, record in content["files"].items()}
        manifest = Manifest(files, content["facts"])
        whole = manifest.text() == text
    except FileNotFoundError:
        raise StorageError(f"{folder}: no {MANIFEST}; it was never committed") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{folder / MANIFEST}: does not read as a manifest ({type(error).__name__})") from error
    if not whole:
        raise StorageError(f"{folder / MANIFEST}: its checksum does not match its content")
    for name in files:
        check_name(name)
    return manifest


def _problem(folder: Path, name: str, record: FileRecord, contents: bool) -> str | None:
    try:
        descriptor = open_inside(folder, name)
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        if size != record.size:
            return f"{name}: {size:,} bytes instead of {record.size:,}"
        if contents and measure(folder, name) != record:
            return f"{name}: its checksum does not match its content"
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror or error})"
    return None


def verify_folder(folder: Path, *, contents: bool = True) -> list[str]:
    """What is wrong with a committed folder, one line a file; empty if nothing. `contents=False` compares sizes alone."""
    try:
        manifest = read_manifest(folder)
    except StorageError as error:
        return [str(error)]
    found = (_problem(folder, name, record, contents) for name, record in manifest.files.items())
    return [problem for problem in found if problem]


def read_bytes(folder: Path, name: str) -> bytes:
    """The bytes of one file of a committed folder, compared with the manifest before they are returned."""
    record = read_manifest(folder).files.get(name)
    if record is None:
        raise StorageError(f"{folder / name}: not in the manifest of {folder}")
    try:
        with open(open_inside(folder, name), "rb") as file:
            data = file.read(record.size + 1)
    except OSError as error:
        raise StorageError(f"{folder / name}: cannot be read ({error.strerror or error})") from error
    if FileRecord(len(data), xxhash.xxh3_64_hexdigest(data)) != record:
        raise StorageError(f"{folder / name}: does not read back as it was written")
    return data


def read_json(folder: Path, name: str) -> Any:
    """A JSON file of a committed folder, verified. Raises StorageError if it is not JSON."""
    try:
        return json.loads(read_bytes(folder, name))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{folder / name}: not JSON") from error


def read_tensors(folder: Path, name: str) -> dict[str, "Tensor"]:
    """The tensors of one safetensors file of a committed folder, verified. Raises StorageError if it is not such a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(read_bytes(folder, name))
    except SafetensorError as error:
        raise StorageError(f"{folder / name}: not a safetensors file ({error})") from error


def read_lines(path: Path) -> tuple[list[Any], int]:
    """The values of a .jsonl file, and how many bytes of a torn last line were passed over.

    A line that is not JSON anywhere else was not written by `append_lines`: StorageError.
    """
    if not path.exists():
        return [], 0
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    values = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise StorageError(f"{path}:{number}: not a line of JSON; was the file edited or damaged?") from error
    return values, len(torn)
