"""Answers are coded and committed in a thread of their own, while the teacher answers the next unit.

It knows a codec and a writer of a cache. Whoever hands it answers learns of a failure at the next hand-over, and never of a success
that was none.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from potstill.cache.codec import Codec
from potstill.cache.store import CacheWriter
from potstill.capture.units import Answer

_UNITS_WAITING = 2


class Recorder:
    """A context around one capture. `put` hands answers over; a clean end commits them all.

    After an error of the caller's own (a teacher that is gone, say) what was handed over is committed too. `committed_rows` and
    `payload_bytes` count what this recorder has committed and coded; `on_first` is told (bytes, rows) of the first unit; what
    `before_commit` raises keeps what is handed over from being committed.
    """

    def __init__(
        self, writer: CacheWriter, codec: Codec, *, commit_seconds: float, shard_bytes: int,
        on_first: Callable[[int, int], None] | None = None, before_commit: Callable[[], None] | None = None,
    ):  # fmt: skip
        self._writer, self._codec, self._commit_seconds, self._on_first = writer, codec, commit_seconds, on_first
        self._shard_bytes, self._before_commit = shard_bytes, before_commit
        self._changed = threading.Condition()
        self._waiting: deque[Sequence[Answer]] = deque()
        self._ended = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self.committed_rows = self.payload_bytes = self.coded_rows = 0
        self._committed_bytes = 0

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()
        if self._failure is not None and self._failure is not error and (kind is None or issubclass(kind, Exception)):
            raise self._failure

    def put(self, answers: Sequence[Answer]) -> None:
        """Waits where two units wait already. Raises what went wrong in coding or committing any unit before this one."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or len(self._waiting) < _UNITS_WAITING)
            self.check()
            self._waiting.append(answers)
            self._changed.notify_all()

    def check(self) -> None:
        """Raises what went wrong, if anything did."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._record()
        except BaseException as failure:  # also what is no Exception must reach the main thread
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _record(self) -> None:
        last_commit = time.monotonic()
        while True:
            with self._changed:
                due = last_commit + self._commit_seconds - time.monotonic()
                self._changed.wait_for(lambda: self._waiting or self._ended, timeout=max(due, 0.0))
                answers = self._waiting.popleft() if self._waiting else None
                ended = self._ended and answers is None
                self._changed.notify_all()
            if answers is not None:
                self._add(answers)
            if ended or time.monotonic() >= last_commit + self._commit_seconds:
                self._commit()
                last_commit = time.monotonic()
            if ended:
                return

    def _add(self, answers: Sequence[Answer]) -> None:
        first = self.coded_rows == 0
        for answer in answers:
            payload = self._codec.encode(answer.record)
            # The writer commits a full shard by itself; it must not do so before what stands before a commit.
            if self.payload_bytes + len(payload) - self._committed_bytes >= self._shard_bytes:
                self._commit()
            self._writer.add(answer.key, answer.rows, payload)
            self.payload_bytes += len(payload)
            self.coded_rows += answer.rows
        if first and self.coded_rows and self._on_first is not None:
            self._on_first(self.payload_bytes, self.coded_rows)

    def _commit(self) -> None:
        if self.committed_rows != self.coded_rows:
            if self._before_commit is not None:
                self._before_commit()
            self._writer.commit()
            self.committed_rows, self._committed_bytes = self.coded_rows, self.payload_bytes
