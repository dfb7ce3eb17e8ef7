"""A cache as it is often written: plain open('wb'), the index before the data, no checksum, no sync, and a name for a provenance.

The fault tests must find its faults; a test that passes it proves nothing.
"""

import json
from pathlib import Path

from potstill import storage


def plain_write(path: Path, data: bytes) -> None:
    """open(path, "wb").write(data), through the operations that a fault injector replaces."""
    descriptor = storage.OPERATIONS.append(path)
    storage.OPERATIONS.truncate(descriptor, 0)
    storage.OPERATIONS.write(descriptor, memoryview(data))
    storage.OPERATIONS.close(descriptor)


class NaiveCache:
    def __init__(self, folder: Path, provenance):
        self.folder = folder
        storage.make_folder(folder)
        name = folder / "name.txt"
        if not name.exists():
            plain_write(name, provenance.notes.get("path", "teacher").encode())
        if name.read_text() != provenance.notes.get("path", "teacher"):
            raise ValueError("another teacher")
        index = folder / "index.json"
        self.index = json.loads(index.read_text()) if index.exists() else {}

    def commit(self, payloads: dict[bytes, bytes]) -> None:
        number = len(list(self.folder.glob("*.bin")))
        offset = 0
        for key, payload in payloads.items():
            self.index[key.hex()] = [number, offset, len(payload)]
            offset += len(payload)
        plain_write(self.folder / "index.json", json.dumps(self.index).encode())
        plain_write(self.folder / f"{number}.bin", b"".join(payloads.values()))

    def has(self, key: bytes) -> bool:
        return key.hex() in self.index

    def read(self, key: bytes) -> bytes:
        number, offset, length = self.index[key.hex()]
        return (self.folder / f"{number}.bin").read_bytes()[offset : offset + length]
