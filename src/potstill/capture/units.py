"""The unit of work: which sequences a teacher is asked at once, and the one function that asks it and makes records of its answer.

Every way to capture (one process, ranks, shards, Ray) does units by this function. It knows neither where records go nor how they
are coded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from potstill.batch import Batch, Example
from potstill.cache.records import Record, RecordFormat, TopKAndDrawn
from potstill.capture.scoring import Asked, needs_of, record_of
from potstill.capture.selecting import uniforms
from potstill.data.collation import collate
from potstill.data.examples import ExampleSet
from potstill.data.packing import pack
from potstill.errors import DataError, TeacherError
from potstill.head import Head
from potstill.signals import TopKOutcomes
from potstill.teachers.teacher import Teacher

_ROUNDED_TO = 8  # what collate rounds the width of a batch to


@dataclass(frozen=True)
class Share:
    """The sequences of one worker of several: those whose key, as a number, leaves `index` when divided by `of`.

    Workers agree without talking, whatever was captured before, and a sequence belongs to one of them.
    """

    index: int = 0
    of: int = 1

    def __contains__(self, key: bytes) -> bool:
        return self.of == 1 or int.from_bytes(key, "little") % self.of == self.index

    def split(self, rank: int, world_size: int) -> "Share":
        """The part of rank `rank` of this share."""
        return Share(self.index + self.of * rank, self.of * world_size)

    @property
    def writer(self) -> str:
        return f"{self.index}-of-{self.of}"


@dataclass(frozen=True)
class Sequences:
    """Sequences to be asked, each once: where they stand (set, number in it), their keys, tokens and target rows."""

    sets: Sequence[ExampleSet]
    places: list[tuple[int, int]]
    keys: list[bytes]
    lengths: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def example(self, number: int) -> Example:
        part, index = self.places[number]
        return self.sets[part][index]

    def examples(self, unit: "Unit") -> list[list[Example]]:
        """The rows of a unit, as `collate` takes them."""
        return [[self.example(number) for number in row] for row in unit.rows]

    def select(self, numbers: np.ndarray) -> "Sequences":
        return Sequences(
            self.sets, [self.places[n] for n in numbers], [self.keys[n] for n in numbers], self.lengths[numbers], self.targets[numbers]
        )


def sequences_of(sets: Sequence[ExampleSet], share: Share) -> Sequences:
    """The sequences of a share; of equal ones the first. Raises DataError for equal ones that two teachers are to answer."""
    found: dict[bytes, tuple[int, int]] = {}
    for part, examples in enumerate(sets):
        for number in range(len(examples)):
            key = examples.digest(number)
            if key not in share:
                continue
            first = found.setdefault(key, (part, number))
            _refuse_two_routes(sets, first, (part, number))
    places = list(found.values())
    lengths, targets = [examples.lengths for examples in sets], [examples.target_counts for examples in sets]
    return Sequences(
        sets, places, list(found), np.array([lengths[part][number] for part, number in places], dtype=np.int64),
        np.array([targets[part][number] for part, number in places], dtype=np.int64),
    )  # fmt: skip


def _refuse_two_routes(sets: Sequence[ExampleSet], first: tuple[int, int], again: tuple[int, int]) -> None:
    """A record is found by its tokens alone, so that one of the two teachers would answer in the name of the other."""
    (one, number), (other, index) = first, again
    if sets[one].route(number) != sets[other].route(index):
        raise DataError(
            f"{sets[other].origin(index)}: the row is for {sets[other].route(index)!r}, and {sets[one].origin(number)} with the same "
            f"tokens for {sets[one].route(number)!r}; a cache holds one answer to a text: give both to one teacher, or capture "
            "each teacher into a cache of its own"
        )


@dataclass(frozen=True)
class Unit:
    """Rows of a batch, each the numbers of the sequences in it."""

    rows: list[list[int]]

    @property
    def numbers(self) -> list[int]:
        return [number for row in self.rows for number in row]


def units(lengths: np.ndarray, batch_tokens: int, *, packed_tokens: int | None = None) -> list[Unit]:
    """Every sequence once, the longest first: little padding, and what does not fit in memory fails at once.

    A unit's rows times its width is at most `batch_tokens`, but for a single row that is longer. With `packed_tokens` rows of up to
    that many tokens hold several sequences; sorted as they are, that saves little, and attention reads more.
    """
    if packed_tokens is None:
        rows = [[number] for number in np.argsort(-lengths, kind="stable").tolist()]
    else:
        rows = sorted(pack(lengths, packed_tokens, seed=0), key=lambda members: -sum(int(lengths[n]) for n in members))
    found: list[Unit] = []
    width, members = 0, []
    for row in rows:
        if not members or (len(members) + 1) * width > batch_tokens:
            members, width = [], -(-sum(int(lengths[n]) for n in row) // _ROUNDED_TO) * _ROUNDED_TO
            found.append(Unit(members))
        members.append(row)
    return found


@dataclass(frozen=True)
class Answer:
    """What the teacher says of one sequence."""

    key: bytes
    rows: int
    record: Record


@dataclass(frozen=True)
class Scorer:
    """The one function that asks. `widest` is the longest row that the model can take; `project_on` a student's frozen head."""

    teacher: Teacher
    format: RecordFormat
    seed: int
    pad_token: int
    widest: int
    device: str = "cpu"
    project_on: Head | None = None

    @torch.no_grad()
    def __call__(self, rows: Sequence[Sequence[Example]]) -> list[Answer]:
        """The answers for every example of the rows, on the CPU. Raises TeacherError for one that is not made of numbers."""
        batch = collate(rows, pad_token=self.pad_token, widest=self.widest).to(self.device)
        outcomes = self.teacher.score(batch, needs_of(self.format, self.teacher.offers)).outcomes
        assert outcomes is not None
        documents = batch.sequences()
        keys = [document.key for document in documents]
        counts = [document.rows.stop - document.rows.start for document in documents]
        asked = Asked(batch.target_rows()[1], self._uniforms(batch, keys, counts))
        record = record_of(outcomes, asked, self.format, project_on=self.project_on).to("cpu")
        if (row := not_a_number(record)) is not None:
            examples = [example for members in rows for example in members]
            number = next(n for n, document in enumerate(documents) if row < document.rows.stop)
            raise TeacherError(
                f"{self.teacher.name}: its answer to {examples[number].origin or f'example {examples[number].index}'} is not a number; "
                "nothing of it was recorded. Load it in a wider dtype (teacher.dtype), or look at its weights"
            )
        return [
            Answer(key, count, record.rows(document.rows)) for key, count, document in zip(keys, counts, documents, strict=True)
        ]

    def _uniforms(self, batch: Batch, keys: Sequence[bytes], counts: Sequence[int]) -> Tensor | None:
        if "sampled" not in self.format.outcomes:
            return None
        parts = [uniforms(self.seed, key, count, self.format.num_samples) for key, count in zip(keys, counts, strict=True)]
        return torch.from_numpy(np.concatenate(parts)).to(batch.tokens.device)


def not_a_number(record: Record) -> int | None:
    """The first row that holds what is none; None where all are numbers. The log of 0 is one, and stands among log-probabilities alone."""
    if isinstance(record, TopKAndDrawn):
        found = [row for row in (not_a_number(record.top), not_a_number(record.drawn)) if row is not None]
        return min(found, default=None)
    bad = torch.zeros(len(record), dtype=torch.bool)
    for tensor in (value for value in vars(record).values() if isinstance(value, Tensor) and value.is_floating_point()):
        wrong = tensor.isnan() | (tensor == torch.inf) if isinstance(record, TopKOutcomes) else ~tensor.isfinite()
        bad |= wrong.flatten(1).any(1) if tensor.dim() > 1 else wrong
    return int(bad.nonzero()[0]) if bad.any() else None
