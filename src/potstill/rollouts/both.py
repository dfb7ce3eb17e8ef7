"""The student's writer and, where the data set does not stand in for it, the teacher's: what authors with both of them do alike.

It decides nothing: who writes a step is the author's matter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from potstill.batch import Example
from potstill.rollouts.author import Stream


class Writes(Protocol):
    """What an author asks of whoever writes for it; `rollouts.writer.Writer` is one."""

    def write(self, rows: Sequence[int], step: int) -> list[Example]:
        """One example a row, in their order. Every rank calls it, with or without rows."""
        ...

    def refresh(self, step: int) -> None: ...

    def metrics(self) -> Mapping[str, float]: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None: ...

    def heed(self, check: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


class Both:
    """`other` is the teacher's writer, or None where the data set stands in its place."""

    def __init__(self, student: Writes, other: Writes | None):
        self.student = student
        self._named: dict[str, Writes] = {"student": student} if other is None else {"student": student, "teacher": other}

    @property
    def others(self) -> Stream:
        """The stream of what the student does not write."""
        return "teacher" if "teacher" in self._named else "dataset"

    def write(self, stream: Stream, rows: Sequence[int], step: int) -> list[Example]:
        """Raises ValueError for a stream that neither of them writes."""
        if stream not in self._named:
            raise ValueError(f"nobody here writes the stream {stream}")
        return self._named[stream].write(rows, step)

    def refresh(self, step: int) -> None:
        for writer in self._named.values():
            writer.refresh(step)

    def metrics(self) -> dict[str, float]:
        """The student's by their names; the teacher's as rollouts/teacher/..."""
        found = dict(self.student.metrics())
        if "teacher" in self._named:
            found |= {f"rollouts/teacher/{key.removeprefix('rollouts/')}": value for key, value in self._named["teacher"].metrics().items()}
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, writer in self._named.items():
            own, numbers[name] = writer.state()
            tensors |= {f"{name}.{key}": value for key, value in own.items()}
        return tensors, numbers

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        for name, writer in self._named.items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            writer.restore(own, numbers.get(name, {}))

    def heed(self, check: Callable[[], None]) -> None:
        for writer in self._named.values():
            writer.heed(check)

    def close(self) -> None:
        for writer in self._named.values():
            writer.close()
