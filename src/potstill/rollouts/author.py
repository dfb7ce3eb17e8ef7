"""What every author can do: choose whose text a step is taken on, and write it. Streams are texts that have an objective of their own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from potstill.batch import Example

Stream = Literal["dataset", "student", "teacher", "text"]


class Group(Protocol):
    """The processes that write together, each its own rows. `training.processes.Ranks` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Element by element over all of them."""
        ...

    def gather(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The one-dimensional int64 or float64 array of each, in their order; lengths may differ."""
        ...


class Alone:
    """A group of one process."""

    rank, world_size = 0, 1

    def sum(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    def gather(self, numbers: np.ndarray) -> list[np.ndarray]:
        return [numbers]


class Author(Protocol):
    """Writes examples for row numbers of the training set. What it chooses is a function of (seed, step) and of what it has been told, and
    so the same on every rank and after a resume.
    """

    @property
    def most_streams(self) -> int:
        """The most streams that one step can have."""
        ...

    def streams(self, step: int) -> Sequence[tuple[Stream, float]]:
        """The streams of the step that comes after `step` steps, each with what its mean loss is multiplied by."""
        ...

    def write(self, stream: Stream, rows: Sequence[int], step: int) -> list[Example]:
        """One example for each of this rank's rows, in their order; where nothing may be learned from one, it has no target.

        Every rank calls it for the same streams in the same order, also where it has no rows. It is called within the forward of the
        wrapped module, without gradients: there the root's parameters are whole under FSDP2, and autocast is what training has.
        """
        ...

    def begin(self, step: int) -> None:
        """The run begins, or goes on, after `step` steps; the student has its weights."""
        ...

    def step_done(self, step: int, *, taken: bool = True) -> None:
        """The `step`-th step, on what was written last, is over: keep what belongs to it. It was not `taken` where it was refused because
        its loss or its gradient was not finite."""
        ...

    def validated(self, loss: float) -> None:
        """The cross-entropy on the validation set, in nats a target, as soon as it is known; no objective scales it."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Means since the last call, by their names in the log. Every rank calls it."""
        ...

    def texts(self) -> list[dict[str, Any]]:
        """Some answers that the last step was taken on, as JSON values, for whoever reads the run folder."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold of it, as of the last `step_done`: tensors, and JSON numbers. What was written for a step that has
        not been taken is no part of it: it will be written again."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None: ...

    def heed(self, check: Callable[[], None]) -> None:
        """`check` is called several times a second while text is written; what it raises ends the writing."""
        ...

    def close(self) -> None: ...
