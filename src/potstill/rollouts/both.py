"""The student's writer and, where the data set does not stand in for it, the teacher's: what authors with both of them do alike.

It decides nothing: who writes a step is the author's matter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from potstill.batch import Example
from potstill.rollouts.author import Stream


class Writes(Protocol):
    """What an author asks of whoever writes for it; `rollouts.writer.Writer` is one, and says more of each."""

    def write(self, rows: Sequence[int], step: int) -> list[Example]:
        """One example a row, in their order. Every rank calls it, with or without rows."""
        ...

    def step_done(self) -> None: ...

    def metrics(self) -> Mapping[str, float]: ...

    def texts(self) -> list[dict[str, Any]]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def heed(self, check: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


class BothWrite:
    """All of an author that hangs on its writers alone; whose text a step is taken on is for those who inherit it to say.

    `other` is the teacher's writer, or None where the data set stands in its place.
    """

    def __init__(self, student: Writes, other: Writes | None):
        self._writers: dict[Stream, Writes] = {"student": student} if other is None else {"student": student, "teacher": other}

    @property
    def most_streams(self) -> int:
        return 1

    @property
    def others(self) -> Stream:
        """The stream of what the student does not write."""
        return "teacher" if "teacher" in self._writers else "dataset"

    def write(self, stream: Stream, rows: Sequence[int], step: int) -> list[Example]:
        """Raises ValueError for a stream that neither of them writes."""
        if stream not in self._writers:
            raise ValueError(f"nobody here writes the stream {stream}")
        return self._writers[stream].write(rows, step)

    def begin(self, step: int) -> None:
        """Nothing: what is written next asks for the weights of its step."""

    def step_done(self, step: int, *, taken: bool = True) -> None:
        for writer in self._writers.values():
            writer.step_done()

    def validated(self, loss: float) -> None:
        """Nothing: who writes does not follow the loss."""

    def metrics(self) -> Mapping[str, float]:
        return {name: value for writer in self._writers.values() for name, value in writer.metrics().items()}

    def texts(self) -> list[dict[str, Any]]:
        return [text for writer in self._writers.values() for text in writer.texts()]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {stream: writer.state() for stream, writer in self._writers.items()}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        for stream, writer in self._writers.items():
            writer.restore(numbers.get(stream, {}))

    def heed(self, check: Callable[[], None]) -> None:
        for writer in self._writers.values():
            writer.heed(check)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
