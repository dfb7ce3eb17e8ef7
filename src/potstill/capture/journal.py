"""Which units a capture had under way, so that the next start can say how many rows are asked again: wrong or gone, it costs that alone.

It is not synced: what a killed process wrote stays, and after a loss of power the number is a lower bound.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from potstill import storage
from potstill.place import Folder, place_at

_NAME = "begun-"
_DIGITS = 32  # of a key, in hexadecimal


class Journal:
    """The journal of one writer in a local cache; elsewhere it keeps nothing, because nothing can be appended there."""

    def __init__(self, path: str, writer: str):
        place = place_at(path)
        self._folder: Path | None = place.path if isinstance(place, Folder) else None
        self._writer = writer

    @property
    def kept(self) -> bool:
        return self._folder is not None

    def begun(self) -> set[bytes]:
        """The keys of every unit that any capture of this cache began and did not see to its end."""
        return set().union(*map(_keys, self._journals()))

    def begin(self, keys: Sequence[bytes]) -> None:
        if self._folder is not None:
            storage.append_lines(self._folder / f"{_NAME}{self._writer}", ["".join(key.hex() for key in keys)])

    def forget(self, held: Callable[[Sequence[bytes]], np.ndarray]) -> None:
        """Removes this writer's journal, and those of others whose every key is committed."""
        for path in self._journals():
            if path.name == _NAME + self._writer or bool(held(sorted(_keys(path))).all()):
                storage.remove(path)

    def _journals(self) -> list[Path]:
        return sorted(self._folder.glob(f"{_NAME}*")) if self._folder is not None and self._folder.is_dir() else []


def _keys(path: Path) -> set[bytes]:
    found = set()
    for line in path.read_bytes().split(b"\n"):
        if len(line) % _DIGITS == 0 and re.fullmatch(rb"[0-9a-f]+", line):  # a torn line is no unit
            found |= {bytes.fromhex(line[at : at + _DIGITS].decode()) for at in range(0, len(line), _DIGITS)}
    return found
