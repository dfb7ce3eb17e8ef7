"""The user's own rows in place of a data set of the hub: which file is which split, and what a task's files then say.

The harness reads them through its own reading of data sets: a file of ours includes the task's, and names the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

from potstill import storage
from potstill.data.config import MixtureItem
from potstill.data.lines import Rejects, Row
from potstill.data.sources import read_source
from potstill.errors import DataError, UsageError
from potstill.evaluation.harness.catalogue import Definition

SUBSET = "{subset}"
_SUBSET_COLUMNS = ("subset", "subject")


@dataclass(frozen=True)
class Splits:
    """Which splits of its data set a task reads: the questions, and the solved examples where `few_shot` is not 0."""

    asked: str
    examples: str | None
    few_shot: int
    known: tuple[str, ...]


def splits_of(definition: Definition, few_shot: int | None) -> Splits:
    """As the harness chooses them. Raises UsageError where a task has no questions, or examples in its prompt for good."""
    values = definition.values
    own = values.get("num_fewshot")
    if own == 0 and few_shot:
        raise UsageError(f"{definition.name}: few_shot: the task is defined without examples (num_fewshot: 0), and the harness keeps to it")
    number = (own or 0) if few_shot is None else few_shot
    training, validation, test = (values.get(f"{kind}_split") for kind in ("training", "validation", "test"))
    settings = values.get("fewshot_config") or {}
    named = settings.get("split") or values.get("fewshot_split")
    asked = test or validation
    if asked is None:
        raise UsageError(f"{definition.name}: names neither test_split nor validation_split, so there is nothing to ask")
    inside = named is None and settings.get("samples") is not None
    examples = None if inside else named or training or validation or test
    known = dict.fromkeys(split for split in (asked, test, validation, training, named) if split is not None)
    return Splits(asked, examples, number, tuple(known))


def require_file(file: str, task: str) -> None:
    """Raises DataError where the rows of `task` are to be read from what is no file."""
    path = Path(file).expanduser()
    if not path.is_file():
        what = "is a folder; name one file" if path.is_dir() else "no such file"
        raise DataError(f"{file}: {what}; the rows of {task} are a .jsonl, .jsonl.gz, .json, .parquet or .csv file")


class OwnRows:
    """The user's files, each read once."""

    def __init__(self, task: str, data: str | Mapping[str, str]):
        self.task, self.data = task, data
        self._read: dict[str, list[Row]] = {}

    def stand_in(self, definition: Definition, splits: Splits, folder: Path, several: bool) -> dict[str, Any]:
        """What a task's definition says of its data set once the rows lie in `folder`. Raises UsageError for splits that are missing."""
        files = {splits.asked: self.data} if isinstance(self.data, str) else dict(self.data)
        if splits.asked not in files:
            raise UsageError(f"{self.task}: data: the questions are the split {splits.asked}, which is not among {', '.join(files)}")
        wrong = [split for split in files if split not in splits.known]
        if wrong:
            raise UsageError(f"{self.task}: data: {definition.name} reads no split {wrong[0]}; it reads {', '.join(splits.known)}")
        if splits.few_shot and splits.examples is not None and splits.examples not in files:
            raise UsageError(
                f"{self.task}: asks with {splits.few_shot} solved examples, which are its split {splits.examples}: give them too, as in "
                f"data: {{{splits.examples}: examples.jsonl, {splits.asked}: {files[splits.asked]}}}, or say few_shot: 0"
            )
        place = folder / definition.name.replace("/", "_").replace(":", "_")
        storage.make_folder(place)
        paths = {split: _write(self._of_subset(file, definition, several), place / f"{split}.parquet") for split, file in files.items()}
        values = definition.values
        said = {f"{kind}_split": values.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")}
        inner = (values.get("fewshot_config") or {}).get("split")
        if inner is not None:
            paths.setdefault(inner, paths[splits.asked])  # read by the harness, and used for nothing where no examples are asked
        return {
            "custom_dataset": None, "dataset_path": "parquet", "dataset_name": None,
            "dataset_kwargs": {"data_files": paths, "cache_dir": str(folder / "cache"), "keep_in_memory": True},
            **{key: split if split in paths else None for key, split in said.items()},
        }  # fmt: skip

    def columns(self) -> list[str]:
        """The columns of the first file."""
        return list(next(iter(self._read.values()))[0].values) if self._read else []

    def _of_subset(self, file: str, definition: Definition, several: bool) -> list[Row]:
        """The rows of one task of a group: a file of its own, or those that its name stands in."""
        subset = definition.values.get("dataset_name")
        if SUBSET in file:
            return self._rows(file.replace(SUBSET, str(subset or definition.name)))
        rows = self._rows(file)
        column = next((name for name in _SUBSET_COLUMNS if name in rows[0].values), None)
        if column is None or subset is None:
            if several and subset is not None:
                raise DataError(
                    f"{file}: {self.task} is {definition.name} and others, each with a subset of the rows: name it in a column "
                    f"{' or '.join(_SUBSET_COLUMNS)}, or give a file for each, as in data: rows/{SUBSET}.jsonl"
                )
            return rows
        found = [row for row in rows if row.values[column] == subset]
        if not found and several:
            raise DataError(f"{file}: no row has {subset!r} in its column {column}, which {definition.name} asks")
        return found or rows

    def _rows(self, file: str) -> list[Row]:
        if file not in self._read:
            require_file(file, self.task)
            rows = read_source(MixtureItem(path=file), _Strict())
            for row in rows:
                odd = sorted(set(rows[0].values) ^ set(row.values))
                if odd:
                    raise DataError(f"{row.origin}: the column {odd[0]!r} is in some rows and not in others; every row needs it (or null)")
            self._read[file] = rows
        return self._read[file]


def _write(rows: Sequence[Row], path: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    try:
        table, held = pyarrow.Table.from_pylist([row.values for row in rows]), pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, held)
    except pyarrow.ArrowException as error:
        said = str(error).splitlines()[0]
        raise DataError(f"{rows[0].source}: a column must hold one kind of value in all rows ({said})") from error
    storage.write_bytes(path, held.getvalue())
    return str(path)


class _Strict(Rejects):
    """Stops at the first bad line: a question that is left out would change what is measured."""

    def refuse(self, origin: str, reason: str, text: str = "") -> Never:
        raise DataError(f"{origin}: {reason}; mend it")
