"""The authors without a memory of text: one writer all the time, or two of whom a draw decides at each step (GKD's lmbda)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from potstill.batch import Example
from potstill.rollouts.author import Stream
from potstill.rollouts.both import BothWrite, Writes
from potstill.rollouts.writing import uniform


class OneAuthor:
    """All text from one writer: the student (also where its tokens come from a mixture with the teacher), or the teacher."""

    def __init__(self, stream: Literal["student", "teacher"], writer: Writes):
        self._stream: Stream = stream
        self._writer = writer

    @property
    def most_streams(self) -> int:
        return 1

    def streams(self, step: int) -> Sequence[tuple[Stream, float]]:
        return [(self._stream, 1.0)]

    def write(self, stream: Stream, rows: Sequence[int], step: int) -> list[Example]:
        return self._writer.write(rows, step)

    def begin(self, step: int) -> None:
        """Nothing: what is written next asks for the weights of its step."""

    def step_done(self, step: int, *, taken: bool = True) -> None:
        self._writer.step_done()

    def validated(self, loss: float) -> None:
        """Nothing: nobody else could write."""

    def metrics(self) -> Mapping[str, float]:
        return self._writer.metrics()

    def texts(self) -> list[dict[str, Any]]:
        return self._writer.texts()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {self._stream: self._writer.state()}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self._writer.restore(numbers.get(self._stream, {}))

    def heed(self, check: Callable[[], None]) -> None:
        self._writer.heed(check)

    def close(self) -> None:
        self._writer.close()


class MixtureAuthor(BothWrite):
    """Each step on the student's text with probability `share`, else on the other writer's, or the data set's where there is none.

    One draw a step, from (seed, step): all ranks and a resumed run make the same one. A share of 0 is the others alone, of 1 the
    student alone. Source: GKD, 2306.13649, algorithm 1.
    """

    def __init__(self, student_writer: Writes, other_writer: Writes | None, share: float, seed: int):
        super().__init__(student_writer, other_writer)
        self._share, self._seed = share, seed

    def streams(self, step: int) -> Sequence[tuple[Stream, float]]:
        return [("student" if uniform(self._seed, step) < self._share else self.others, 1.0)]
