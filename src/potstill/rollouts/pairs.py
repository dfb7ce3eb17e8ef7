"""DistiLLM-2's author: to each prompt an answer of the student's and one of another's, each with a weight (2503.07067, equation 5).

What is made of the two, skew KL on the one and skew reverse KL on the other, is the objectives' matter.
"""

from collections.abc import Sequence

from potstill.rollouts.author import Stream
from potstill.rollouts.both import BothWrite, Writes
from potstill.rollouts.config import PairConfig


class PairAuthor(BothWrite):
    """Two streams a step over the same rows: the others' times 2 - B, and the student's times B."""

    def __init__(self, student_writer: Writes, other_writer: Writes | None, config: PairConfig, *, num_steps: int):
        """`other_writer` is the teacher's; None takes the answers of the data set. `num_steps` is the length of the run."""
        super().__init__(student_writer, other_writer)
        self._config, self._num_steps = config, max(num_steps, 1)

    @property
    def most_streams(self) -> int:
        return 2

    def student_weight(self, step: int) -> float:
        """B of the step that comes after `step` steps."""
        return min(1.0 + step / self._num_steps, 1.5) if self._config.gradual else self._config.student_weight

    def streams(self, step: int) -> Sequence[tuple[Stream, float]]:
        """Without what has no weight, which would cost as much as the other."""
        own = self.student_weight(step)
        both: list[tuple[Stream, float]] = [(self.others, 2.0 - own), ("student", own)]
        return [(stream, weight) for stream, weight in both if weight]
