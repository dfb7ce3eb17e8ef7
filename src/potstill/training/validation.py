"""The loss on the validation set: every target counts once, whatever the batch, the packing and the number of ranks."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from potstill.batch import Batch
from potstill.training.feeding import Rows
from potstill.training.processes import Ranks

# What the distiller has `SEEN`, as the log names it.
_NAMES = ("top1_agreement", "entropy", "teacher_entropy")


def means_by_name(seen: Sequence[float], targets: float) -> dict[str, float]:
    """Each as a mean over targets, entropies in nats; what is not known of every target is left out."""
    return {name: value / targets for name, value in zip(_NAMES, seen, strict=True) if targets and math.isfinite(value)}


class Validation:
    """Cuts a data set into batches for the ranks, long rows first, and sums their losses. Knows no model, only `measure`."""

    def __init__(self, rows: Rows, batch_size: int, ranks: Ranks):
        self._rows, self._size, self._ranks = rows, batch_size, ranks
        self._ordered = sorted(range(len(rows)), key=lambda row: (-rows.lengths[row], row))

    def __len__(self) -> int:
        """Batches of each rank; the ranks have equally many, for a sharded model must be called equally often."""
        return math.ceil(len(self._ordered) / (self._size * self._ranks.world_size))

    def batch(self, turn: int) -> Batch:
        """This rank's batch; of padding alone where the rows have run out."""
        first = (turn * self._ranks.world_size + self._ranks.rank) * self._size
        return self._rows.batch(self._ordered[first : first + self._size])

    def means(self, measure: Callable[[Batch], tuple[tuple[Tensor, ...], float]], after_batch: Callable[[], None]) -> list[float]:
        """`measure(batch)` returns sums and a count; here the sums of all ranks are divided by the count of all ranks."""
        totals: list[float] = []
        for turn in range(len(self)):
            after_batch()
            sums, count = measure(self.batch(turn))
            values = [*(float(value) for value in sums), float(count)]
            totals = [a + b for a, b in zip(totals, values, strict=True)] if totals else values
        *sums_of_all, count_of_all = self._ranks.sum(totals)
        return [value / max(count_of_all, 1.0) for value in sums_of_all]

