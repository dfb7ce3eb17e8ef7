"""How what is measured goes along an answer: sums over rows by the bucket of their place in it, for pictures.

A place is counted from 1 at the first token of an answer, anew in each answer of a conversation. Buckets double: 1, 2-3, 4-7, 8-15 ...
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from potstill.batch import Batch
from potstill.evaluation.metrics import COLUMN, NUM_COLUMNS
from potstill.evaluation.task import Series

NUM_BUCKETS = 20
X_LABEL = "place in the answer (tokens)"
KIND = "by_position"


class ByPosition:
    """Sums [NUM_BUCKETS, NUM_COLUMNS] of the columns of `metrics`. `before`: for an Example.index, by how many places its first answer
    began earlier than its first target (a window that goes on with an answer)."""

    def __init__(self, before: Mapping[int, int] | None = None):
        self._before = {index: count for index, count in (before or {}).items() if count}
        self.sums = np.zeros((NUM_BUCKETS, NUM_COLUMNS))

    def buckets(self, batch: Batch, documents: Sequence[int], owner: Tensor) -> Tensor:
        """The bucket of each target row [N]; `documents` are the Example.index of the responses, `owner` [N] says which is each row's."""
        places, runs = answer_places(batch)
        for number, document in enumerate(documents):
            if count := self._before.get(document):
                rows = (owner == number).nonzero()[:, 0]
                places[rows[runs[rows] == runs[rows[0]]]] += count
        return places.log2().floor().long().clamp_max(NUM_BUCKETS - 1)

    def add(self, buckets: Tensor, measured: Tensor) -> None:
        """Counts rows [n, NUM_COLUMNS] in their buckets [n]."""
        sums = torch.zeros(NUM_BUCKETS, NUM_COLUMNS, dtype=torch.float64)
        self.sums += sums.index_add_(0, buckets.cpu(), measured.cpu().double()).numpy()

    def means(self, column: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(middles of the buckets that hold rows, the mean of a column over the rows in each)."""
        counts = self.sums[:, COLUMN["targets"]]
        held = np.flatnonzero(counts)
        return tuple(middle(int(bucket)) for bucket in held), tuple(float(self.sums[b, COLUMN[column]] / counts[b]) for b in held)

    def series(self, names: Mapping[str, tuple[str, str]]) -> tuple[Series, ...]:
        """One picture a column: `names` gives its label and what stands at its y axis."""
        return tuple(Series(KIND, label, X_LABEL, y_label, *self.means(column)) for column, (label, y_label) in names.items())


def middle(bucket: int) -> float:
    """The middle of the places of a bucket: 1, 2.5, 5.5, 11.5 ..."""
    return (3 * 2.0 ** int(bucket) - 1) / 2


def answer_places(batch: Batch) -> tuple[Tensor, Tensor]:
    """For each target row [N] its place in its answer, from 1 (float64), and the number of the answer: targets without a gap are one."""
    rows, responses = batch.target_rows()[0], batch.target_responses()
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = (rows[1:] != rows[:-1] + 1) | (responses[1:] != responses[:-1])
    number = torch.arange(len(rows), device=rows.device)
    begun = torch.where(first, number, 0).cummax(0).values if len(rows) else number
    return (number - begun + 1).double(), first.cumsum(0)
