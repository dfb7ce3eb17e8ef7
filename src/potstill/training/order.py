"""Which rows an optimizer step sees: a pure function of (seed, step), the same for any number of ranks.

The rows of an epoch are permuted by (seed, epoch) and cut into global batches; the last one of an epoch may be short and is
kept. Ranks only divide a global batch. It knows row numbers and lengths, and nothing of tokens, models or processes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd

import numpy

from potstill.errors import ConfigError


def mix(*numbers: int) -> int:
    """A seed of 63 bits out of several numbers, so that no two uses of the run's seed meet."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Division:
    """How the ranks share a global batch: `over_micro_batches` of them take different micro-batches, each of which is cut among
    `within_micro_batch` of them."""

    over_micro_batches: int
    within_micro_batch: int

    @classmethod
    def of(cls, world_size: int, batch_size: int, accumulation: int) -> "Division":
        """Raises ConfigError where `world_size` ranks cannot share it evenly."""
        over = gcd(world_size, accumulation)
        within = world_size // over
        if batch_size % within:
            multiple = world_size * ceil(accumulation / world_size)
            raise ConfigError(
                f"training: {world_size} ranks cannot share an optimizer step of {accumulation} micro-batches of {batch_size} rows; "
                f"make accumulation a multiple of {world_size} (such as {multiple}) and batch_size * accumulation what it was, "
                "or start another number of ranks"
            )
        return cls(over, within)


@dataclass(frozen=True)
class MicroBatch:
    """The rows that one rank works on at once. `number` counts through the run and is the same for any number of ranks, so that
    dropout can be seeded by it. Where `everywhere_empty` no rank has a row, and the forward pass can be left out."""

    rows: tuple[int, ...]
    number: int
    everywhere_empty: bool


@dataclass(frozen=True)
class Window:
    """The rows of one optimizer step, in the order in which they are counted as seen."""

    step: int
    epoch: int
    rows: tuple[int, ...]


class GlobalOrder:
    """`lengths` are the tokens of each row; rows of a step that are alike in length share a micro-batch, which saves padding."""

    def __init__(self, lengths: Sequence[int], *, seed: int, batch_size: int, accumulation: int):
        if not len(lengths):
            raise ValueError("an order needs at least one row")
        self.lengths = numpy.asarray(lengths, dtype=numpy.int64)
        self.seed, self.batch_size, self.accumulation = seed, batch_size, accumulation
        self._epoch, self._permutation = -1, numpy.empty(0, dtype=numpy.int64)

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return ceil(len(self.lengths) / self.global_batch)

    def permutation(self, epoch: int) -> numpy.ndarray:
        """All rows, in the order of `epoch`. From the raw stream of PCG64, which NumPy promises never to change."""
        if epoch != self._epoch:
            keys = numpy.random.PCG64(numpy.random.SeedSequence([self.seed, epoch])).random_raw(len(self.lengths))
            self._epoch, self._permutation = epoch, numpy.argsort(keys, kind="stable")
        return self._permutation

    def window(self, step: int) -> Window:
        """The global batch of optimizer step `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        chosen = self.permutation(epoch)[index * self.global_batch : (index + 1) * self.global_batch]
        return Window(step, epoch, tuple(int(row) for row in chosen))

    def share(self, window: Window, rank: int, world_size: int) -> list[MicroBatch]:
        """What `rank` does in `window`: the same number of micro-batches on every rank and in every window.

        A short window leaves micro-batches without rows; these come first, so that the last one, after which the ranks exchange
        gradients, is a real one wherever there is one.
        """
        division = Division.of(world_size, self.batch_size, self.accumulation)
        over, part = divmod(rank, division.within_micro_batch)
        rows = numpy.asarray(window.rows, dtype=numpy.int64)
        rows = rows[numpy.argsort(-self.lengths[rows], kind="stable")]
        micro_batches = [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
        local = self.accumulation // division.over_micro_batches
        shares = []
        for turn in range(local):
            index = turn * division.over_micro_batches + over
            mine = micro_batches[index][part :: division.within_micro_batch] if index < len(micro_batches) else ()
            number = window.step * self.accumulation + index
            empty = turn * division.over_micro_batches >= len(micro_batches)
            shares.append(MicroBatch(tuple(int(row) for row in mine), number, empty))
        real = [share for share in shares if not share.everywhere_empty]
        return [share for share in shares if share.everywhere_empty] + real
