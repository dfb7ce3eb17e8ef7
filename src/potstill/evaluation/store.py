"""Results that were measured before, found again by the content of model and task. A damaged one is measured again."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from potstill import manifest, storage
from potstill.errors import StorageError
from potstill.evaluation.task import Outcome

_RESULT, _STATEMENT = "result.json", "measured.json"
_log = logging.getLogger("potstill")


def key_of(statement: Mapping[str, Any]) -> str:
    """A digest of everything that decides a result, as JSON values."""
    return xxhash.xxh3_128_hexdigest(manifest.to_json(statement).encode())


class Store:
    """A folder with one committed folder a result: `task/key/`. Several processes may share it."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).expanduser().absolute()

    def _place(self, task: str, statement: Mapping[str, Any]) -> Path:
        return self.folder / task / key_of(statement)

    def read(self, task: str, statement: Mapping[str, Any]) -> Outcome | None:
        """The result of exactly this, or None where there is none that can be believed."""
        place = self._place(task, statement)
        if not place.is_dir():
            return None
        try:
            return Outcome.from_json(manifest.read_json(place, _RESULT))
        except (ValueError, KeyError, TypeError, StorageError) as error:
            _log.warning("%s: this result does not read (%s); it is measured again", place, error)
        storage.remove(place)
        return None

    def write(self, task: str, statement: Mapping[str, Any], outcome: Outcome) -> None:
        """Commits a result; one that another process committed meanwhile stays."""
        place = self._place(task, statement)
        storage.make_folder(place.parent)

        def put(at: Path) -> None:
            storage.write_json(at / _RESULT, outcome.to_json())
            storage.write_json(at / _STATEMENT, dict(statement))

        if place.is_dir():
            return
        try:
            storage.commit_folder(place, put)
        except StorageError:
            if not place.is_dir():
                raise
