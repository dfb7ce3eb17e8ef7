"""DistiLLM's author: each step on the data, on fresh text of the student, or on text that it wrote before (2402.03898, section 3.2).

How often which comes is schedule.py's matter, what is kept is buffer.py's; here they become streams, alike on all ranks.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from potstill.batch import Example
from potstill.rollouts.author import Group, Stream
from potstill.rollouts.both import BothWrite, Writes
from potstill.rollouts.buffer import Record, ReplayBuffer, gathered
from potstill.rollouts.config import ReplayConfig
from potstill.rollouts.schedule import Branch, Schedule


class ReplayAuthor(BothWrite):
    """One stream a step. Text is put into the buffer when the step that it was written for has been taken: a break before it loses
    nothing, and what a refused step was about does not come again.

    What comes out of the buffer keeps the log-probabilities that it was drawn with; teacher and student read it anew, so that ratios are
    of the student as it is now. The buffer holds the text of all ranks, on each of them.
    """

    def __init__(
        self, student_writer: Writes, other_writer: Writes | None, config: ReplayConfig, *, seed: int, num_steps: int, group: Group
    ):
        """`other_writer` is the teacher's; None takes the answers of the data set. `num_steps` is the length of the run."""
        super().__init__(student_writer, other_writer)
        self._group, self._seed = group, seed
        self.schedule = Schedule(config, seed=seed, num_steps=num_steps)
        self.buffer = ReplayBuffer(config.capacity)
        self._fresh: list[Record] = []  # of the step in progress, as is what follows
        self._drawn: dict[str, int] = {}
        self._line: Counter[str] = Counter()  # since the last line of the log: steps by branch, replayed answers and their ages

    def branch(self, step: int) -> Branch:
        """What the step after `step` steps is taken on."""
        return self.schedule.branch(step, buffer_full=self.buffer.full)

    def streams(self, step: int) -> Sequence[tuple[Stream, float]]:
        return [(self.others if self.branch(step) == "others" else "student", 1.0)]

    def write(self, stream: Stream, rows: Sequence[int], step: int) -> list[Example]:
        self._fresh, self._drawn = [], {}
        if stream != "student":
            return super().write(stream, rows, step)
        if self.branch(step) == "replayed":
            return self._replayed(rows, step)
        written = super().write(stream, rows, step)
        records = [Record.of(example, row, step) for row, example in zip(rows, written, strict=True) if example.num_targets]
        self._fresh = gathered(records, self._group.gather)
        return written

    def _replayed(self, rows: Sequence[int], step: int) -> list[Example]:
        """One of the buffer for each row of the step; which one hangs on the rows of all ranks, not on how they are shared."""
        every = np.sort(np.concatenate(self._group.gather(np.array(rows, dtype=np.int64))))
        drawn = self.buffer.draw(len(every), seed=self._seed, step=step)
        self._drawn = {"answers": len(drawn), "ages": sum(step - record.step for record in drawn)}
        return [drawn[int(place)].example() for place in np.searchsorted(every, np.array(rows, dtype=np.int64))]

    def step_done(self, step: int, *, taken: bool = True) -> None:
        self._line.update({self.branch(step - 1): 1, **self._drawn})
        if taken:  # text that broke a step would break others
            self.buffer.push(self._fresh)
        self._fresh, self._drawn = [], {}
        super().step_done(step, taken=taken)

    def validated(self, loss: float) -> None:
        self.schedule.validated(loss)

    def metrics(self) -> Mapping[str, float]:
        """The writers', and: the threshold, how full the buffer is, the shares of fresh and replayed steps, and how many steps ago
        what was replayed had been written."""
        found = {"rollouts/threshold": self.schedule.threshold, "rollouts/buffer": float(len(self.buffer))}
        line, self._line = self._line, Counter()
        if steps := line["fresh"] + line["replayed"] + line["others"]:
            found |= {f"rollouts/{branch}": line[branch] / steps for branch in ("fresh", "replayed")}
        if line["answers"]:
            found["rollouts/age"] = line["ages"] / line["answers"]
        return {**super().metrics(), **found}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        numbers = {"writers": super().state()[1], "schedule": self.schedule.state(), "line": dict(self._line)}
        return self.buffer.tensors(), numbers

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self._fresh, self._drawn = [], {}
        super().restore({}, numbers.get("writers", {}))
        self.buffer.restore(tensors)
        self.schedule.restore(numbers.get("schedule", {}))
        self._line = Counter(numbers.get("line", {}))
