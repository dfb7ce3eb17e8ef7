"""Asks a teacher for what a cache does not hold yet, and commits the answers while it goes: one process's share of a capture.

Kill it at any moment: what is committed stays, and the next start asks for the rest. It knows a teacher, examples and a writer of a
cache; where they come from is not its affair.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from potstill.cache.codec import make_codec
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheWriter
from potstill.capture.config import CaptureConfig
from potstill.capture.disk import predicted_bytes, require_room
from potstill.capture.journal import Journal
from potstill.capture.recording import Recorder
from potstill.capture.scoring import needs_of
from potstill.capture.units import Scorer, Sequences, Share, Unit, sequences_of, units
from potstill.counting_progress import CountingProgress
from potstill.data.examples import ExampleSet
from potstill.errors import InterruptedRun
from potstill.head import Head
from potstill.interruption import SignalWatch
from potstill.teachers.teacher import Teacher, confirm, heed, require


@dataclass(frozen=True)
class CaptureSummary:
    """What one process did. Rows are target rows; `tokens` are what the teacher read, padding not counted."""

    sequences: int = 0
    rows: int = 0
    tokens: int = 0
    payload_bytes: int = 0
    seconds: float = 0.0
    redone_rows: int = 0
    """Rows of these that an earlier start had asked for and not committed."""
    most_in_flight: int = 0
    """The most rows that were asked for and not yet committed: what a kill would have cost."""
    found_sequences: int = 0
    """Of this share, committed before the start."""

    @property
    def bytes_per_row(self) -> float:
        return self.payload_bytes / self.rows if self.rows else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Work:
    """What is left of a share: the sequences that nobody has committed, and how many of its sequences somebody has."""

    sequences: Sequences
    found_sequences: int

    @property
    def rows(self) -> int:
        return int(self.sequences.targets.sum())

    @property
    def tokens(self) -> int:
        return int(self.sequences.lengths.sum())


def work_left(examples: Sequence[ExampleSet], writer: CacheWriter, share: Share) -> Work:
    """The sequences of a share that `writer`'s cache does not hold."""
    wanted = sequences_of(examples, share)
    held = writer.holds(wanted.keys) if len(wanted) else np.zeros(0, bool)
    return Work(wanted.select(np.flatnonzero(~held)), int(held.sum()))


def capture(
    teacher: Teacher, examples: Sequence[ExampleSet], writer: CacheWriter, format: RecordFormat, config: CaptureConfig, *,
    seed: int, pad_token: int, share: Share = Share(), device: str = "cpu", packed_tokens: int | None = None,  # noqa: B008 - frozen
    project_on: Head | None = None, quiet: bool = False,
) -> CaptureSummary:  # fmt: skip
    """Asks for every sequence of `share` that the cache does not hold, once each, and commits the answers. The writer stays open.

    Raises InterruptedRun after SIGTERM or SIGINT, whatever the teacher raises, and StorageError; what was answered before is committed
    in the first two cases. Raises IncompatibleError and StorageError before the first question where the teacher or the disk cannot.
    """
    require(teacher, needs_of(format, teacher.offers), f"capture.outcomes {format.outcomes}")
    work = work_left(examples, writer, share)
    require_room(config.path, predicted_bytes(format, work.rows, len(work.sequences)))
    journal = Journal(config.path, share.writer)
    begun = journal.begun()
    again = sum(int(rows) for key, rows in zip(work.sequences.keys, work.sequences.targets, strict=True) if key in begun)
    if not quiet:
        _say_start(config, work, again)
    widest = max((int(part.lengths.max()) for part in examples if len(part)), default=8)
    scorer = Scorer(teacher, format, seed, pad_token, max(widest, packed_tokens or 0), device, project_on)
    planned = units(work.sequences.lengths, config.batch_tokens, packed_tokens=packed_tokens)
    summary = _ask(_Asking(work.sequences, scorer, writer, config, journal, quiet), planned)
    writer.refresh()
    journal.forget(writer.holds)
    return replace(summary, redone_rows=again, found_sequences=work.found_sequences)


@dataclass(frozen=True)
class _Asking:
    """What the loop over units needs."""

    sequences: Sequences
    scorer: Scorer
    writer: CacheWriter
    config: CaptureConfig
    journal: Journal
    quiet: bool


class _BrokenOff(Exception):
    """A signal came while an answer was waited for."""


def _break_off(watch: SignalWatch) -> None:
    if watch.received:
        raise _BrokenOff


def _ask(asking: _Asking, planned: Sequence[Unit]) -> CaptureSummary:
    sequences, config = asking.sequences, asking.config
    rows = tokens = asked = most_in_flight = 0
    began = time.monotonic()
    recorder = Recorder(
        asking.writer, make_codec(asking.scorer.format), commit_seconds=config.commit_seconds, shard_bytes=config.shard_mib * 2**20,
        on_first=lambda size, of_rows: require_room(config.path, _left(asking, size / of_rows), measured=True),
        before_commit=lambda: confirm(asking.scorer.teacher),
    )  # fmt: skip
    with (
        SignalWatch("committing what was answered") as watch,
        CountingProgress(int(sequences.lengths.sum()), doing="Capturing", done="captured", unit="tokens", quiet=asking.quiet) as progress,
        recorder, suppress(_BrokenOff),
    ):  # fmt: skip
        heed(asking.scorer.teacher, partial(_break_off, watch))
        for unit in planned:
            if watch.received:
                break
            recorder.check()
            asking.journal.begin([sequences.keys[number] for number in unit.numbers])
            most_in_flight = max(most_in_flight, rows + int(sequences.targets[unit.numbers].sum()) - recorder.committed_rows)
            recorder.put(asking.scorer(sequences.examples(unit)))
            rows += int(sequences.targets[unit.numbers].sum())
            tokens += (of_unit := int(sequences.lengths[unit.numbers].sum()))
            asked += len(unit.numbers)
            progress.advance(of_unit)
    if watch.received and asked < len(sequences):
        raise InterruptedRun(
            f"{config.path}: interrupted; {asked:,} of {len(sequences):,} sequences were answered and are committed, the same command "
            "asks for the rest", watch.received,
        )  # fmt: skip
    return CaptureSummary(asked, rows, tokens, recorder.payload_bytes, time.monotonic() - began, most_in_flight=most_in_flight)


def _left(asking: _Asking, bytes_per_row: float) -> int:
    """Bytes of everything that is to come, by the first unit's measure; what it wrote itself is in it, which is little."""
    return predicted_bytes(
        asking.scorer.format, int(asking.sequences.targets.sum()), len(asking.sequences), per_row=bytes_per_row
    )


# ---------------------------------------------------------------- what the user is told


def _say_start(config: CaptureConfig, work: Work, again: int) -> None:
    held = f"{work.found_sequences:,} sequences are committed, " if work.found_sequences else ""
    sys.stderr.write(
        f"{config.path}: {held}{len(work.sequences):,} with {work.rows:,} rows are left; a kill costs at most the answers of "
        f"{config.commit_seconds:g} s and three batches of {config.batch_tokens:,} tokens\n"
    )
    if again:
        sys.stderr.write(f"{again:,} of these rows were under way when an earlier start ended, and are asked for again\n")


def say_end(summary: CaptureSummary, path: str) -> str:
    """The closing line; of several ranks their sum."""
    if not summary.sequences:
        return f"{path}: every sequence is committed already ({summary.found_sequences:,}); nothing was asked"
    return (
        f"{path}: {summary.sequences:,} sequences captured, {summary.rows:,} rows of {summary.tokens:,} tokens, "
        f"{summary.bytes_per_row:.1f} bytes a row, {summary.tokens_per_second:,.0f} tokens a second; {summary.redone_rows:,} rows were "
        f"asked for again; a kill would have cost {summary.most_in_flight:,} rows at most"
    )
