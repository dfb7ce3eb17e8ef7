"""A file of JSON lines, each found again by its key: appended whole, durable at once, and never asked for a second time.

One process at a time; a line that was torn by a kill is cut off when the file is opened, so that the next one starts afresh.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill import storage
from potstill.environment import redact
from potstill.errors import StorageError


class KeptLines:
    """Lines by key, those of one key in the order in which they came. Raises StorageError where the file was damaged."""

    def __init__(self, path: Path):
        self.path = path
        lines, torn = storage.read_lines(path)
        if torn:
            storage.write_bytes(path, path.read_bytes()[:-torn])
        self._lines: dict[str, list[dict[str, Any]]] = {}
        for number, line in enumerate(lines, start=1):
            if not isinstance(line, dict) or not isinstance(line.get("key"), str):
                raise StorageError(f"{path}:{number}: not a line of this file; was it edited? Remove the line, and it is asked for again")
            self._lines.setdefault(line["key"], []).append(line)

    def get(self, key: str) -> Sequence[Mapping[str, Any]]:
        return self._lines.get(key, ())

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (line for lines in self._lines.values() for line in lines)

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Durable on return; secrets are blanked. Raises StorageError."""
        kept = [redact(dict(line)) for line in lines]
        storage.append_lines(self.path, [storage.to_json(line) for line in kept], sync=True)
        for line in kept:
            self._lines.setdefault(line["key"], []).append(line)
