"""The folder in which a generation keeps every answer that it was given, until and after the data set is made of them.

Answers are appended in whole units, each line with its checksum; every start of every process writes files of its own, so that a torn
line is nobody's beginning. It knows rows by their numbers, and no model, no text and no filter.
"""

import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from potstill import storage
from potstill.cache.provenance import NOTES, Provenance
from potstill.errors import RunFolderError, StorageError
from potstill.lock import Lock
from potstill.rollouts.writing import Completion

_PROVENANCE = "provenance.json"
_LOCK = "lock"
_FILE = re.compile(r"answers-(\d+)-of-(\d+)-(\d+)\.jsonl")


class Job(NamedTuple):
    """One answer to one row."""

    row: int
    sample: int


@dataclass(frozen=True)
class Given:
    """An answer as it was given: its ids, the one that ended it included."""

    tokens: array
    ended: bool


class AnswersFolder:
    """The answers beside a data set. One launch at a time holds it; `open` on its first rank, before the others read."""

    def __init__(self, data_set: Path):
        self.path = data_set.with_name(data_set.name + ".answers")
        self._data_set = data_set
        self.damaged = 0
        """Lines whose checksum does not hold, in the last `read`: their answers are asked for again."""
        self._file: Path | None = None

    def open(self, stated: Provenance) -> Lock:
        """Makes the folder, or takes it up where it was made from the same. The lock is the caller's to release.

        Raises RunFolderError where another launch holds it, where it was made from something else (naming the field), and where the data
        set is a file that no generation wrote.
        """
        if not self.path.exists() and self._data_set.exists():
            raise RunFolderError(
                f"generate.path: {self._data_set}: is there already, and {self.path.name} beside it is not, so potstill generate did not "
                "write it or is to write it anew; name another path, or move the file away"
            )
        storage.make_folder(self.path)
        lock = Lock(self.path / _LOCK, held="another potstill generate is writing this", remedy="stop it, or set generate.path to another")
        try:
            storage.sweep(self.path)
            self._compare(stated)
        except BaseException:
            lock.release()
            raise
        return lock

    def _compare(self, stated: Provenance) -> None:
        file = self.path / _PROVENANCE
        if not file.exists():
            if self._files():
                raise RunFolderError(f"{self.path}: holds answers and no {_PROVENANCE}, so nobody can say whose; remove the folder")
            storage.write_json(file, dict(stated.fields))
            return
        values = _read_json(file)
        for difference in stated.differences(Provenance(values)):
            field, here, there = difference.shown()
            raise RunFolderError(
                f"generate.path: {self._data_set}: its answers were made from something else: {field} is {here} in this recipe and {there} "
                "there; set it back, or name another path"
            )

    @property
    def notes(self) -> dict[str, Any]:
        """What was stated for people alone."""
        return _read_json(self.path / _PROVENANCE).get(NOTES) or {}

    # ---------------------------------------------------------------- answers

    def read(self) -> dict[Job, Given]:
        """Every answer that is committed; of a job that was answered twice the first. Lines that are torn or damaged are passed over."""
        found: dict[Job, Given] = {}
        self.damaged = 0
        for file in self._files():
            whole, _, _torn = file.read_bytes().rpartition(b"\n")
            for line in whole.split(b"\n") if whole else []:
                answers = _answers_of(line)
                if answers is None:
                    self.damaged += 1
                    continue
                for job, given in answers.items():
                    found.setdefault(job, given)
        return found

    def commit(self, jobs: Sequence[Job], completions: Sequence[Completion], *, rank: int, world_size: int) -> None:
        """Durable on return. Raises StorageError."""
        if self._file is None:
            starts = [int(found[3]) for file in self._files() if (found := _FILE.fullmatch(file.name)) and int(found[1]) == rank]
            self._file = self.path / f"answers-{rank:04d}-of-{world_size:04d}-{max(starts, default=-1) + 1:06d}.jsonl"
        answers = [[*job, int(done.ended), list(done.tokens)] for job, done in zip(jobs, completions, strict=True)]
        body = storage.to_json(answers)
        storage.append_lines(self._file, [f'{{"answers": {body}, "xxh3": "{_digest(body)}"}}'], sync=True)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(file for file in self.path.iterdir() if _FILE.fullmatch(file.name) and not file.is_symlink())


def _digest(body: str) -> str:
    return xxhash.xxh3_64_hexdigest(body.encode())


def _answers_of(line: bytes) -> dict[Job, Given] | None:
    """The answers of one line, or None for one that does not read as it was written."""
    try:
        content = json.loads(line)
        if _digest(storage.to_json(content["answers"])) != content["xxh3"]:
            return None
        return {Job(row, sample): Given(array("i", tokens), bool(ended)) for row, sample, ended, tokens in content["answers"]}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{file}: does not read ({type(error).__name__}); remove the folder to begin anew") from error
    if not isinstance(values, dict):
        raise StorageError(f"{file}: holds no statement; remove the folder to begin anew")
    return values
